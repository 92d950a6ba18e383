"""What a finished run leaves: all of it, and a card that the hub can read."""

import json
import re
import shutil

import pytest
import yaml
from PIL import Image

from resnet_flax.inference.evaluate import evaluate
from resnet_flax.runs import results
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.model_card import MARK
from resnet_flax.runs.results import write_results
from tests.support.finished_run import RESULTS


def draw_nothing(monkeypatch):
    for name in ("plot_curves", "plot_confusion", "plot_predictions", "plot_mistakes"):
        monkeypatch.setattr(results, name, lambda *arguments: None)


def test_the_folder(shared_run):
    folder = shared_run.folder
    pictures = {"curves.png", "confusion.png", "predictions.png", "mistakes.png"}
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "checkpoints", "model.safetensors", "README.md"} | pictures
    for name in pictures:
        with Image.open(folder / name) as picture:
            picture.load()


def test_the_cards_front_matter(shared_run):
    folder, network, variables, data = shared_run
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["library_name"] == "flax"
    assert head["license"] == "mit"
    assert head["datasets"] == ["zalando-datasets/fashion_mnist"]
    assert head["metrics"] == ["accuracy"]
    assert "image-classification" in head["tags"]
    (model,) = head["model-index"]
    (result,) = model["results"]
    assert model["name"] == "resnet18-fashion-mnist"
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"]["type"] in head["datasets"]
    (metric,) = result["metrics"]
    scores = evaluate(network, variables, data)
    assert metric == {"type": "accuracy", "value": pytest.approx(scores.accuracy, abs=5e-5)}
    assert f"On 60 test images its accuracy is **{scores.accuracy:.4f}**" in text


@pytest.mark.foreign
def test_the_hub_reads_the_card(shared_run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(shared_run[0] / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_type) == (
        "accuracy",
        "zalando-datasets/fashion_mnist",
    )
    assert card.data.license == "mit"


def test_the_cards_text(shared_run):
    folder, network, *_ = shared_run
    text = (folder / "README.md").read_text()
    assert (
        "python train.py --model resnet18 --recipe d2l --epochs 10 --batch-size 256 "
        "--learning-rate 0.1 --image-size 28 --seed 0 --dtype float32 --test-examples 60\n" in text
    )
    for row in RESULTS:
        assert (
            f"| {row.epoch} | {row.loss:.3f} | {row.train_acc:.3f} | {row.test_acc:.3f} |" in text
        )
    for name in network.classes:
        assert f"\n| {name} | " in text
    assert "averaged with its mirror image's" in text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / picture).exists()
    assert "{" not in text
    assert max(map(len, text.splitlines())) < 250


def test_the_cards_snippet_runs(shared_run):
    folder, *_, data = shared_run
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    namespace = {"images": data.images[:2] / 255}
    exec(snippet.replace('"FOLDER"', repr(str(folder))), namespace)
    assert namespace["logits"].shape == (2, 10)


def test_a_card_that_someone_changed_is_kept(shared_run, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    folder = shutil.copytree(shared_run.folder, tmp_path / "run")
    rest = (TrainConfig(run_dir=folder, image_size=28), *shared_run[1:], RESULTS)
    (folder / "README.md").write_text(f"{MARK}\nold")
    write_results(folder, *rest)
    assert "old" not in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    write_results(folder, *rest)
    assert (folder / "README.md").read_text() == "mine"


def test_a_card_of_validation_says_so(shared_run, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    config = TrainConfig(run_dir=tmp_path, image_size=28, validation_examples=60)
    write_results(tmp_path, config, *shared_run[1:], RESULTS)
    card = (tmp_path / "README.md").read_text()
    assert "On 60 validation images" in card
    assert "split: validation\n" in card
    assert "--validation-examples 60\n" in card
    assert "test" not in card.replace("--test", "")


def test_the_configuration_describes_the_network(shared_run):
    folder, network, *_ = shared_run
    content = json.loads((folder / "config.json").read_text())
    assert content["network"] == network.as_json()
    assert content["network"]["stage_sizes"] == [1, 1]
    assert content["model"] == "resnet18"
