"""Scores against definitions written out, and the program on folders and files."""

import json
import math
import sys

import numpy as np
import optax
import pytest

from resnet_flax import build_model
from resnet_flax.commands import evaluate
from resnet_flax.commands.command_line import run_command
from resnet_flax.data import FASHION_MNIST_CLASSES, Dataset, Splits
from resnet_flax.errors import InputError
from resnet_flax.inference.scores import calibration_error, score, softmax
from resnet_flax.training import step as training
from resnet_flax.training.step import Images, create_train_state
from resnet_flax.weights import save_safetensors, to_torch
from tests.support.finished_run import new_network, new_variables, random_images

NO, YES = [4.0, 0.0, 0.0], [0.0, 4.0, 0.0]


@pytest.fixture
def program(monkeypatch, capsys):
    """The program in this process, on random images: exit code, stdout, stderr."""
    test_data = random_images(60)
    monkeypatch.setattr(evaluate, "keep_compiled_programs", lambda: None)

    def load(name, data_dir, **options):
        classes = FASHION_MNIST_CLASSES if name == "fashion_mnist" else ("a", "b")
        return Splits(test_data, test_data, classes)

    monkeypatch.setattr(evaluate, "load_dataset", load)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            code = run_command(evaluate.main)
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def test_scores_of_a_small_case():
    scores = score(np.array([NO, NO, YES, YES]), np.array([0, 1, 1, 1]))
    assert scores.accuracy == 0.75
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert scores.precision == (1 / 2, 1.0, None)
    assert scores.recall == (1.0, 2 / 3, None)
    sure = math.exp(4) / (math.exp(4) + 2)
    assert scores.loss == pytest.approx(-(3 * math.log(sure) + math.log((1 - sure) / 2)) / 4)
    assert scores.calibration_error == pytest.approx(abs(sure - 0.75))


def guos_equation(confidences, right):
    """Equation 3 of Guo et al., 2017, with their M = 15, word for word."""
    error = 0.0
    for m in range(1, 16):
        members = [i for i, c in enumerate(confidences) if (m - 1) / 15 < c <= m / 15]
        if members:
            accuracy = sum(bool(right[i]) for i in members) / len(members)
            confidence = sum(confidences[i] for i in members) / len(members)
            error += len(members) / len(confidences) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("seed", range(5))
def test_the_calibration_error_is_guos(seed):
    random = np.random.default_rng(seed)
    confidences = random.uniform(0.1, 1, 1000)
    right = random.uniform(size=1000) < confidences**2
    expected = guos_equation(confidences, right)
    assert calibration_error(confidences, right) == pytest.approx(expected)
    assert expected > 0.05


def test_the_calibration_error_at_the_ends():
    assert calibration_error(np.ones(4), np.ones(4, bool)) == 0
    assert calibration_error(np.ones(4), np.zeros(4, bool)) == 1
    assert calibration_error(np.array([1 / 3]), np.array([True])) == pytest.approx(2 / 3)


def test_large_logits_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        scores = score(np.array([[1e4, -1e4], [1e4, -1e4]], np.float32), np.array([0, 1]))
    assert scores.loss == 1e4
    np.testing.assert_array_equal(softmax(np.array([1e4, -1e4])), [1, 0])


def test_it_agrees_with_the_evaluation_in_training(shared_run):
    _, network, variables, data = shared_run
    placed = Images.place(data.images, data.labels)
    state = create_train_state(network.model, optax.identity(), placed, 0, variables=variables)
    expected = training.evaluate(state, placed, batch_size=16, image_size=28, flip=True)
    scores = evaluate.evaluate(network, variables, data)
    assert scores.accuracy == expected.accuracy
    assert scores.loss == pytest.approx(expected.loss, rel=1e-5)


def test_the_program_on_a_run_folder(shared_run, program):
    folder, network, variables, data = shared_run
    code, said, error = program(folder)
    assert (code, error) == (0, "")
    scores = evaluate.evaluate(network, variables, data)
    lines = said.splitlines()
    assert lines[0].split() == ["class", "precision", "recall"]
    assert len(lines) == 1 + 10 + 2
    assert lines[10].startswith("ankle boot  ")
    assert lines[-1] == (
        f"accuracy {scores.accuracy:.4f}, loss {scores.loss:.4f}, "
        f"calibration error {scores.calibration_error:.4f} on 60 images"
    )


def test_json(shared_run, program):
    folder, network, variables, data = shared_run
    code, said, _ = program(folder, "--json", "--test-examples", 20)
    assert code == 0
    found = json.loads(said)
    scores = evaluate.evaluate(network, variables, data.take(20))
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
    scores = evaluate.evaluate(network, variables, random_images(60).take(8))
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
        ([tmp_path / "absent.safetensors", "--model", "resnet18"], "cannot read"),
        ([folder, "--model", "resnet18"], "are for a .safetensors file"),
        ([folder, "--test-examples", 0], "cannot take the first 0 of 60 examples"),
        ([folder, "--model", "resnet19"], "invalid choice"),
        ([folder, "--dataset", "beans"], "tells 10 classes apart, t-shirt"),
    ]:
        code, said, error = program(*arguments)
        assert (code, said) == (2, ""), arguments
        assert words in error
        assert error.count("\n") == 1


def test_other_images_and_other_classes(shared_run):
    _, network, variables, data = shared_run
    colours = Dataset(data.images.repeat(3, -1), data.labels)
    with pytest.raises(InputError, match="takes images of 1 channels; the test set's have 3"):
        evaluate.evaluate(network, variables, colours)
    more = Dataset(data.images, data.labels + 40)
    with pytest.raises(InputError, match="tells 10 classes apart; the test set has"):
        evaluate.evaluate(network, variables, more)


def test_a_run_does_not_choose_which_folder_is_read():
    network = new_network(dataset="folder:/etc")
    with pytest.raises(InputError, match="trained on folder:/etc: name the folder by --dataset"):
        evaluate.load_test_set(network, None, None)
