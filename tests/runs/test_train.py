"""`resnet_flax.train`: the whole job in one call, wherever Python runs."""

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import resnet_flax
from resnet_flax.data import LazyImages, Resizing
from resnet_flax.errors import InputError, TrainingError
from resnet_flax.inference.pretrained import read_pretrained
from resnet_flax.nn.preprocessing import IMAGENET_NORMALIZATION
from resnet_flax.runs import TrainConfig
from resnet_flax.runs.train import choose_normalization, load_data, resizing_for, show_progress
from resnet_flax.training.position import EpochResult, Position
from resnet_flax.training.recipes import RECIPES
from tests.support.finished_run import new_network, write_pretrained
from tests.support.image_files import write_classes

# A last batch of one image: the last stage of this network still has 7x7 values to normalise.
SMALL = {"recipe": "d2l", "epochs": 1, "train_examples": 65, "batch_size": 32, "test_examples": 32}


@pytest.fixture(autouse=True, scope="module")
def no_cache() -> Iterator[None]:
    """The user's own stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["resnet_flax.runs.train"], "keep_compiled_programs", lambda: None)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder of a network that compiles in seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    write_pretrained(folder, new_network())
    return folder


def trained(tiny: Path, folder: Path) -> resnet_flax.Run:
    return resnet_flax.train(TrainConfig(**SMALL, init=tiny, run_dir=folder))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, fashion_mnist, no_cache, tiny) -> resnet_flax.Run:
    return trained(tiny, tmp_path_factory.mktemp("runs") / "first")


def test_links_in_the_data_are_followed_when_asked(tmp_path):
    write_classes(tmp_path / "outside", ("mice",))
    root = write_classes(tmp_path / "root")
    (root / "mice").symlink_to(tmp_path / "outside" / "mice")
    config = TrainConfig(dataset=f"folder:{root}", follow_links=True)
    assert load_data(config).classes == ("cats", "dogs", "mice")
    with pytest.raises(InputError, match="or allow it by `follow_links`"):
        load_data(TrainConfig(dataset=f"folder:{root}"))


def some_results(count: int) -> list[EpochResult]:
    return [EpochResult(number + 1, 0.5, 0.8, 0.7, 100.0, 2.0) for number in range(count)]


def test_curves_are_drawn_now_and_then(tmp_path, monkeypatch):
    drawn = []

    def draw(results: list[EpochResult], path: Path) -> None:
        drawn.append(len(results))
        path.touch()

    monkeypatch.setattr(sys.modules["resnet_flax.runs.train"], "plot_curves", draw)
    for count in range(1, 8):
        show_progress(tmp_path, TrainConfig(), some_results(count))
        if count in (3, 5):  # a clock may be set back
            other = time.time() + (60 if count == 3 else -60)
            os.utime(tmp_path / "curves.png", (other, other))
    assert drawn == [1, 4, 6]


def test_progress_that_cannot_be_shown_stops_no_run(tmp_path, caplog):
    (tmp_path / "curves.png").mkdir()
    os.utime(tmp_path / "curves.png", (0, 0))
    show_progress(tmp_path, TrainConfig(), some_results(1))
    assert len(caplog.messages) == 1
    assert "the progress is not shown (cannot write" in caplog.messages[0]
    assert caplog.messages[0].endswith("curves.png: Is a directory)")


def test_the_last_epoch_is_on_the_disk_before_a_signal_may_end_the_run(
    tmp_path, monkeypatch, fashion_mnist, tiny
):
    kept = []

    def fit(job, state, position, *, epoch_ended, **options):
        position = Position(some_results(job.epochs))
        epoch_ended(state, position)
        kept.extend(tmp_path.glob("run/checkpoints/*/SHA256SUMS"))
        return state, position

    monkeypatch.setattr(sys.modules["resnet_flax.runs.train"], "fit", fit)
    trained(tiny, tmp_path / "run")
    assert len(kept) == 1


def test_it_returns_what_it_trained(first_run):
    model, variables, results, folder = first_run
    assert [row.epoch for row in results] == [1]
    read, same = resnet_flax.from_pretrained(folder)
    images = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_array_equal(logits, jax.jit(read.apply)(same, images))


def test_in_a_thread_with_a_running_event_loop_it_does_the_same_and_touches_no_signal(
    first_run, tiny, tmp_path
):
    async def cell() -> resnet_flax.Run:  # as in a notebook
        return trained(tiny, tmp_path / "run")

    before, found = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(cell())))
    thread.start()
    thread.join()
    weights = [(run.folder / "model.safetensors").read_bytes() for run in (first_run, found[0])]
    assert weights[0] == weights[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_finetune_mirrors_images_to_train_and_none_to_score(tmp_path, monkeypatch):
    class JobSeenError(Exception):
        pass

    def fit(job, *others, **options):
        raise JobSeenError(job)

    monkeypatch.setattr(sys.modules["resnet_flax.runs.train"], "fit", fit)
    small = {"model": "resnet8", "image_size": 16, "batch_size": 8}
    dataset = f"folder:{write_classes(tmp_path / 'images', size=(16, 16))}"
    config = TrainConfig(recipe="finetune", dataset=dataset, run_dir=tmp_path / "run", **small)
    with pytest.raises(JobSeenError) as seen:
        resnet_flax.train(config)
    job = seen.value.args[0]
    assert job.step_options["flip"]
    assert not job.eval_options["flip"]
    assert not json.loads((config.run_dir / "config.json").read_text())["network"]["flip"]


def test_the_recipe_imagenet_learns_pictures_and_is_kept_with_its_run(tmp_path, monkeypatch):
    tiny = {"block": resnet_flax.Bottleneck, "stage_sizes": (1,), "channels": 8, "stem": "cifar"}
    monkeypatch.setitem(resnet_flax.ARCHITECTURES, "tiny", tiny)
    pictures = tmp_path / "pictures"
    for part in ("train", "test"):
        for number, name in enumerate(("dark", "light")):
            folder = write_classes(pictures / part, (name,), 32, size=(12, 10)) / name
            for path in folder.iterdir():
                image = np.asarray(Image.open(path)) // 4 + 191 * number
                Image.fromarray(image.astype(np.uint8)).save(path)
    settings = {"model": "tiny", "image_size": 7, "batch_size": 16, "epochs": 8}
    config = TrainConfig(
        recipe="imagenet",
        dataset=f"folder:{pictures}",
        run_dir=tmp_path / "run",
        normalization_groups=2,
        **settings,
    )
    run = resnet_flax.train(config)
    assert run.results[-1].train_acc == 1
    assert run.results[-1].test_acc == 1
    content = json.loads((config.run_dir / "config.json").read_text())
    assert (content["learning_rate"], content["dtype"]) == (0.1 * 16 / 256, "bfloat16")
    network = read_pretrained(config.run_dir)[0]
    assert network.model.dtype == "bfloat16"
    assert network.normalization == IMAGENET_NORMALIZATION
    assert network.resizing == Resizing(8)  # 7 / 0.875
    card = (config.run_dir / "README.md").read_text()
    assert "--learning-rate 0.00625 --image-size 7 --seed 0 --dtype bfloat16" in card
    assert "--normalization-groups 2" in card
    assert "--normalization imagenet" not in card  # as the recipe says already
    again = resnet_flax.train(TrainConfig(resume=True, run_dir=config.run_dir))
    assert again.results == run.results


def test_how_the_recipe_imagenet_sees_pictures():
    config = TrainConfig(recipe="imagenet")
    assert resizing_for(224, None, RECIPES["imagenet"].crop_share) == Resizing(256)
    assert resizing_for(224, None, RECIPES["d2l"].crop_share) is None
    grey = choose_normalization(config, None, 1)
    np.testing.assert_allclose(grey, [[0.449], [0.226]], rtol=1e-12)  # Fashion-MNIST's one channel
    assert choose_normalization(TrainConfig(), None, 1) is None
    told = new_network(resizing=Resizing(40, squash=True), image_size=32)
    assert resizing_for(64, told, 0.875) == Resizing(80, squash=True)


def test_it_goes_on_with_the_fields_of_its_run(first_run, tmp_path):
    folder = shutil.copytree(first_run.folder, tmp_path / "run")
    again = resnet_flax.train(TrainConfig(resume=True, run_dir=folder))
    assert again.results == first_run.results
    with pytest.raises(InputError, match="whose run differs: `train_examples` 65 there, 128 here"):
        resnet_flax.train(TrainConfig(resume=True, run_dir=folder, train_examples=128))
    content = json.loads((folder / "config.json").read_text())
    assert (content["recipe"], content["epochs"], content["train_examples"]) == ("d2l", 1, 65)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, no_cache, tiny) -> dict[str, object]:
    """A folder with a broken test image, and how to train on it."""
    root = tmp_path_factory.mktemp("images") / "images"
    write_classes(root / "train", count=10, size=(16, 16))
    write_classes(root / "test", count=4, size=(16, 16))
    (root / "test" / "dogs" / "01.png").write_bytes(b"not any more")
    options = {"init": tiny, "recipe": "d2l", "epochs": 2, "batch_size": 8, "image_size": 16}
    return {**options, "dataset": f"folder:{root}", "skip_broken": True}


def test_a_stream_gives_what_a_set_in_memory_gives(streamed, tmp_path, caplog):
    """Of pixels as they are; what is broken counts neither here nor there."""
    runs = {
        stream: resnet_flax.train(
            TrainConfig(**streamed, stream=stream, workers=0, run_dir=tmp_path / stream)
        )
        for stream in ("always", "auto")
    }
    rows = [[row[:4] for row in run.results] for run in runs.values()]
    np.testing.assert_allclose(*rows, rtol=1e-5)
    leaves = [jax.tree.leaves(run.variables) for run in runs.values()]
    for ours, theirs in zip(*leaves, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert "passed over " in caplog.text
    for stream, recorded in (("always", "always"), ("auto", "never")):
        folder = runs[stream].folder
        assert json.loads((folder / "config.json").read_text())["stream"] == recorded
        assert "On 7 test images its accuracy" in (folder / "README.md").read_text()
        assert (folder / "mistakes.png").exists()
    again = TrainConfig(resume=True, run_dir=runs["always"].folder, stream="auto", workers=1)
    assert resnet_flax.train(again).results == runs["always"].results


def test_what_turns_out_to_be_broken_stops_a_stream_with_a_line(streamed, tmp_path):
    config = TrainConfig(**streamed | {"skip_broken": False}, stream="always", workers=0)
    run_dir = tmp_path / "run"
    line = r"cannot read .*01\.png \(not a PNG or JPEG image\): mend or remove .*`skip_broken`"
    with pytest.raises(TrainingError, match=line):
        resnet_flax.train(dataclasses.replace(config, run_dir=run_dir))
    assert [*(run_dir / "checkpoints").glob("[0-9]*")]
    # Mended, it goes on; passed over, too.
    resumed = TrainConfig(run_dir=run_dir, resume=True, skip_broken=True)
    assert [row.epoch for row in resnet_flax.train(resumed).results] == [1, 2]


def test_fashion_mnist_is_no_stream():
    with pytest.raises(InputError, match="`stream` always is for folders"):
        TrainConfig(stream="always")


def test_what_would_fill_a_quarter_of_the_memory_is_streamed(streamed, monkeypatch):
    module = sys.modules["resnet_flax.runs.train"]
    needed = 28 * 16 * 16 * 3
    for memory, kind in ((4 * needed, np.ndarray), (4 * needed - 4, LazyImages)):
        monkeypatch.setattr(module, "memory", lambda memory=memory: memory)
        fields = {name: streamed[name] for name in ("dataset", "image_size", "skip_broken")}
        assert isinstance(load_data(TrainConfig(**fields)).train.images, kind)
