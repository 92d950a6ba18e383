"""``train.py`` as a person runs it: in a process of its own, on the real data."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file

from resnet_flax.commands.command_line import run_command
from resnet_flax.commands.train import main
from resnet_flax.inference.evaluate import evaluate
from resnet_flax.inference.pretrained import read_pretrained
from tests.support.finished_run import new_network, write_pretrained
from tests.support.image_files import write_classes

TRAIN = Path(__file__).parents[2] / "train.py"
# D2L's flavour and recipe, on a network that compiles in seconds.
SMALL = "--recipe d2l --batch-size 64 --train-examples 128 --test-examples 100".split()
CLOSING_LINES = (
    r"loss \d+\.\d{3}, train acc [01]\.\d{3}, test acc [01]\.\d{3}\n"
    r"\d+\.\d examples/sec on (cpu|cuda:\d+)\n\Z"
)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Compiled programs are shared by this module's processes, and by nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def tiny_network(tmp_path_factory):
    """What `SMALL` starts from: two blocks of D2L's, with 8 and 16 channels, for 28x28 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    write_pretrained(folder, new_network())
    SMALL.extend(["--init", str(folder)])
    yield
    del SMALL[-2:]


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, TRAIN, *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, fashion_mnist):
    folder = tmp_path_factory.mktemp("train")
    return folder, train(folder, *SMALL, "--epochs", "2", "--run-dir", "run")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(row: dict) -> dict:
    """What does not depend on the clock."""
    return {name: row[name] for name in ("epoch", "loss", "train_acc", "test_acc")}


def test_it_ends_with_d2ls_two_lines(finished_run):
    _, process = finished_run
    assert process.returncode == 0, process.stderr
    assert re.search(CLOSING_LINES, process.stdout)
    assert "Traceback" not in process.stderr


def test_the_run_folder_holds_what_it_should(finished_run):
    folder, process = finished_run
    run = folder / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "curves.png",
        "confusion.png",
        "predictions.png",
        "mistakes.png",
        "README.md",
    }
    config = json.loads((run / "config.json").read_text())
    assert (config["image_size"], config["epochs"], config["seed"]) == (28, 2, 0)
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == [1, 2]
    last = rows[-1]
    assert (
        f"loss {last['loss']:.3f}, train acc {last['train_acc']:.3f}, "
        f"test acc {last['test_acc']:.3f}\n" in process.stdout
    )
    with Image.open(run / "curves.png") as picture:
        assert picture.size == (750, 525)


def test_the_card_and_the_loaded_network_have_the_last_lines_accuracy(finished_run, fashion_mnist):
    run = finished_run[0] / "run"
    accuracy = metrics(run)[-1]["test_acc"]
    assert (
        f"On 100 test images its accuracy is **{accuracy:.4f}**" in (run / "README.md").read_text()
    )
    scores = evaluate(*read_pretrained(run), fashion_mnist[1].take(100))
    assert scores.accuracy == accuracy


def test_the_weights_load_in_pytorch(finished_run):
    import torch
    from torch import nn

    from tests.support.torch_reference import resnet_block

    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)),
        resnet_block(8, 8, 1, first_block=True),
        resnet_block(8, 16, 1),
        nn.Identity(),
        nn.Identity(),
        nn.Linear(16, 10),
    )
    tensors = load_file(finished_run[0] / "run" / "model.safetensors")
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})


@pytest.mark.slow
def test_d2ls_network_is_the_default_and_its_weights_load_in_pytorch(tmp_path, fashion_mnist):
    import torch

    from tests.support.torch_reference import d2l_resnet18

    few = "--epochs 1 --train-examples 300 --test-examples 100".split()
    process = train(tmp_path, *few, "--run-dir", "run")
    assert process.returncode == 0, process.stderr
    assert re.search(CLOSING_LINES, process.stdout)
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    network = d2l_resnet18()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})


def test_a_resumed_run_ends_as_the_undisturbed_one(finished_run, tmp_path):
    folder, _ = finished_run
    first = train(tmp_path, *SMALL, "--epochs", "1", "--run-dir", "run")
    assert first.returncode == 0, first.stderr
    second = train(tmp_path, *SMALL, "--epochs", "2", "--run-dir", "run", "--resume")
    assert second.returncode == 0, second.stderr
    expected = [figures(row) for row in metrics(folder / "run")]
    assert [figures(row) for row in metrics(tmp_path / "run")] == expected
    ours, theirs = (load_file(path / "run" / "model.safetensors") for path in (tmp_path, folder))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_resuming_a_finished_run_repeats_its_closing_lines(finished_run):
    folder, process = finished_run
    again = train(folder, "--run-dir", "run", "--resume")
    assert again.returncode == 0
    assert again.stdout == "".join(process.stdout.splitlines(keepends=True)[-2:])


@pytest.mark.parametrize(
    ("signum", "moment", "said"),
    [
        (signal.SIGINT, "", ""),  # in the imports
        (signal.SIGTERM, "compiling the training step", "train.py: "),
        (signal.SIGINT, "compiled in", "train.py: interrupted: epoch "),
        (signal.SIGTERM, "epoch 1/999", "train.py: interrupted: epoch "),
    ],
)
def test_a_signal_stops_it_within_seconds(tmp_path, fashion_mnist, signum, moment, said):
    log = tmp_path / "log"
    flags = [*SMALL, "--epochs", "999", "--run-dir", "run"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, TRAIN, *flags], cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 120
    time.sleep(0.5)
    while moment not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    # Alone on a machine it is a few; a compilation that is under way is waited for.
    assert process.wait(timeout=60) == 128 + signum
    text = log.read_text()
    assert "Traceback" not in text
    assert said in (text.splitlines() or [""])[-1]
    if "epoch" in said:
        assert "is saved; go on with: python " in text
        assert text.endswith("--resume --run-dir run\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet19"], "invalid choice: 'resnet19'"),
        (["--epochs", "-1"], "--epochs must be at least 1, not -1"),
        (["--image-size", "0"], "--image-size must be at least 1, not 0"),
        (["--train-examples", "70000"], "70000"),
        (
            "--train-examples 65 --image-size 28 --batch-size 64".split(),
            "last batch would hold 1 image",
        ),
        (["--run-dir", "file/run"], "cannot write the run folder file/run"),
        (["--resume"], "nothing to resume"),
        (["--data-dir", "file"], "file"),
        (["--dataset", "folder:file"], "cannot read the images in file: Not a directory"),
        (["--dataset", "cifar1O"], "did you mean cifar10?"),
        (["--recipe", "fast", "--freeze-stages", "5"], "--freeze-stages must be at most 4, the"),
        (["--recipe", "fast", "--init", "absent.safetensors"], "cannot read absent.safetensors"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    tmp_path, arguments, words, fashion_mnist, monkeypatch, capsys
):
    (tmp_path / "file").write_text("a file, where a folder should be")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    # The user's own cache stays as it is.
    monkeypatch.setattr(sys.modules["resnet_flax.runs.train"], "keep_compiled_programs", int)
    try:
        code = run_command(main)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    line = said.err.splitlines()[-1]
    assert line.startswith("train.py: error: ")
    assert words in line
    assert "Traceback" not in said.err
    assert said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def own_data_runs(tmp_path_factory):
    """A run on coloured images of three classes, and one that goes on from it with grey ones."""
    folder = tmp_path_factory.mktemp("own")
    write_classes(folder / "pets", ("cats", "dogs", "mice"), count=10)
    write_classes(folder / "marks" / "train", count=8, size=(12, 9), mode="L")
    write_classes(folder / "marks" / "test", count=4, size=(9, 12), mode="L")
    flags = "--model resnet8 --flavour torchvision --image-size 8 --batch-size 8".split()
    pets = train(folder, *flags, *"--dataset folder:pets --epochs 1 --run-dir first".split())
    init = "--init first/model.safetensors --freeze-stages 3 --tensorboard --epochs 2".split()
    second = [*flags, "--dataset", "folder:marks", *init, "--run-dir", "second"]
    return folder, pets, train(folder, *second), train(folder, "--resume", "--run-dir", "second")


@pytest.mark.slow  # test_by_name.py trains on such a folder in this process, a tiny network
def test_it_trains_on_a_folder_of_images(own_data_runs):
    folder, process, *_ = own_data_runs
    assert process.returncode == 0, process.stderr
    assert re.search(CLOSING_LINES, process.stdout)
    assert "pets has no test set of its own: 20% of each class, drawn with seed 0" in process.stderr
    assert (
        "folder:pets: 24 images to train on, 6 to test on; 8x8 pixels, coloured; 3 classes\n"
        in process.stderr
    )
    network = json.loads((folder / "first" / "config.json").read_text())["network"]
    assert network["fit"] == "crop"
    weights = load_file(folder / "first" / "model.safetensors")
    assert weights["conv1.weight"].shape == (32, 3, 3, 3)
    assert weights["fc.weight"].shape[0] == 3


@pytest.mark.slow  # test_by_name.py trains on such a folder in this process, a tiny network
def test_it_goes_on_from_other_weights_and_leaves_what_is_frozen(own_data_runs):
    folder, _, process, _ = own_data_runs
    assert process.returncode == 0, process.stderr
    for line in (
        "start from first/model.safetensors",
        "stem: 3 input channels summed into one",
        "dense layer: drawn anew for 2 classes",
        "folder:marks: 16 images to train on, 8 to test on; 8x8 pixels, grey; 2 classes",
    ):
        assert f"{line}\n" in process.stderr
    before, after = (load_file(folder / run / "model.safetensors") for run in ("first", "second"))
    kept = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    learnt = {name for name in before if "num_batches" not in name} - kept
    assert {name.partition(".")[0] for name in learnt} == {"conv1", "layer3", "fc"}
    assert {name.partition(".")[0] for name in kept} >= {"bn1", "layer1", "layer2"}
    stem = before["conv1.weight"].astype("float64").sum(1, keepdims=True).astype("float32")
    assert (after["conv1.weight"] == stem).all()


@pytest.mark.slow  # test_by_name.py trains on such a folder in this process, a tiny network
def test_a_resumed_fine_tuning_ends_the_same(own_data_runs):
    folder, _, process, again = own_data_runs
    assert again.returncode == 0, again.stderr
    assert again.stdout == "".join(process.stdout.splitlines(keepends=True)[-2:])
    assert len(list((folder / "second").glob("events.out.tfevents.*"))) == 1


def test_no_data_and_no_network_is_one_line(tmp_path):
    environment = {**os.environ, "PATH": "", "http_proxy": "http://127.0.0.1:9"}
    process = subprocess.run(
        [sys.executable, TRAIN, "--data-dir", "data"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.rglob("*.gz"))
