"""``resnet-flax evaluate`` on folders and files."""

import json
import sys

import pytest

from resnet_flax import build_model
from resnet_flax.commands import evaluate
from resnet_flax.commands.command_line import run_command
from resnet_flax.data import FASHION_MNIST_CLASSES, Splits
from resnet_flax.inference.evaluate import evaluate as score
from resnet_flax.weights import save_safetensors, to_torch
from tests.support.finished_run import new_network, new_variables, random_images


@pytest.fixture
def program(monkeypatch, capsys):
    """The program in this process, on random images: exit code, stdout, stderr."""
    test_data = random_images(60)
    monkeypatch.setattr(evaluate, "keep_compiled_programs", lambda: None)

    def load(name, data_dir, **options):
        classes = FASHION_MNIST_CLASSES if name == "fashion_mnist" else ("a", "b")
        return Splits(test_data, test_data, classes)

    monkeypatch.setattr(sys.modules["resnet_flax.inference.evaluate"], "load_dataset", load)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            code = run_command(evaluate.main)
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def test_the_program_on_a_run_folder(shared_run, program):
    folder, network, variables, data = shared_run
    code, said, error = program(folder)
    assert (code, error) == (0, "")
    scores = score(network, variables, data)
    lines = said.splitlines()
    assert lines[0].split() == ["class", "precision", "recall"]
    assert len(lines) == 1 + 10 + 2
    assert lines[10].startswith("ankle boot  ")
    assert lines[-1] == (
        f"accuracy {scores.accuracy:.4f}, loss {scores.loss:.4f}, "
        f"calibration error {scores.calibration_error:.4f} on 60 images"
    )


def test_links_are_followed_when_asked(shared_run, program, monkeypatch):
    asked = []

    def load(name, data_dir, **options):
        asked.append(options["follow_links"])
        return Splits(random_images(60), random_images(60), FASHION_MNIST_CLASSES)

    monkeypatch.setattr(sys.modules["resnet_flax.inference.evaluate"], "load_dataset", load)
    for flags in ([], ["--follow-links"]):
        assert program(shared_run[0], "--dataset", "folder:x", *flags)[0] == 0
    assert asked == [False, True]


def test_json(shared_run, program):
    folder, network, variables, data = shared_run
    code, said, _ = program(folder, "--json", "--test-examples", 20)
    assert code == 0
    found = json.loads(said)
    scores = score(network, variables, data.take(20))
    assert found["examples"] == 20
    assert (found["accuracy"], found["loss"]) == (scores.accuracy, scores.loss)
    assert found["calibration_error"] == scores.calibration_error
    assert found["confusion"] == scores.confusion.tolist()
    assert [each["recall"] for each in found["classes"].values()] == list(scores.recall)
    assert [each["precision"] for each in found["classes"].values()] == list(scores.precision)
    assert None in scores.precision  # of so few images, some class is named for none


def test_the_program_on_a_file_of_weights(program, tmp_path):
    network = new_network(build_model("resnet18", "torchvision"))
    variables = new_variables(network)
    path = tmp_path / "tuned.safetensors"
    save_safetensors(path, to_torch(network.model, variables, "huggingface"))
    flags = ("--model", "resnet18", "--image-size", 28, "--test-examples", 8, "--json")
    code, said, _ = program(path, *flags)
    assert code == 0
    scores = score(network, variables, random_images(60).take(8))
    assert json.loads(said)["loss"] == pytest.approx(scores.loss, rel=1e-5)


def test_bad_input_is_one_line(shared_run, program, tmp_path):
    folder, *_ = shared_run
    many = new_network(build_model("resnet18", num_classes=7))
    save_safetensors(tmp_path / "7.safetensors", to_torch(many.model, new_variables(many)))
    file = tmp_path / "7.safetensors"
    for arguments, words in [
        ([tmp_path], "holds no trained network"),
        ([file], "which network is in"),
        ([file, "--model", "resnet18"], "tells 7 classes apart; Fashion-MNIST has 10"),
        ([file, "--model", "resnet50"], "do not fit"),
        ([file, "--model", "resnet18", "--image-size", -1], "--image-size must be between"),
        ([file, "--model", "resnet18", "--image-size", 0], "--image-size must be between"),
        ([tmp_path / "absent.safetensors", "--model", "resnet18"], "cannot read"),
        ([folder, "--model", "resnet18"], "are for a .safetensors file"),
        ([folder, "--image-size", 0], "are for a .safetensors file"),
        ([folder, "--test-examples", 0], "cannot take the first 0 of 60 examples"),
        ([folder, "--model", "resnet19"], "invalid choice"),
        ([folder, "--dataset", "beans"], "tells 10 classes apart, t-shirt"),
    ]:
        code, said, error = program(*arguments)
        assert (code, said) == (2, ""), arguments
        assert words in error
        assert error.count("\n") == 1
