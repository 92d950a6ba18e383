"""A network's scores are those of the evaluation in training; a test set that fits it is found."""

import sys

import numpy as np
import optax
import pytest

from resnet_flax import build_model
from resnet_flax.data import Dataset, LazyImages
from resnet_flax.errors import InputError
from resnet_flax.inference.evaluate import evaluate, load_test_set, read_weights
from resnet_flax.training import step as training
from resnet_flax.training.step import Images, create_train_state
from resnet_flax.weights import save_safetensors, to_torch
from tests.support.finished_run import new_network, new_variables
from tests.support.image_files import write_classes


def test_it_agrees_with_the_evaluation_in_training(shared_run):
    _, network, variables, data = shared_run
    placed = Images.place(data.images, data.labels)
    state = create_train_state(network.model, optax.identity(), placed, 0, variables=variables)
    expected = training.evaluate(state, placed, batch_size=16, image_size=28, flip=True)
    scores = evaluate(network, variables, data)
    assert scores.accuracy == expected.accuracy
    assert scores.loss == pytest.approx(expected.loss, rel=1e-5)


def test_other_images_and_other_classes(shared_run):
    _, network, variables, data = shared_run
    colours = Dataset(data.images.repeat(3, -1), data.labels)
    with pytest.raises(InputError, match="takes images of 1 channels; the test set's have 3"):
        evaluate(network, variables, colours)
    more = Dataset(data.images, data.labels + 40)
    with pytest.raises(InputError, match="tells 10 classes apart; the test set has"):
        evaluate(network, variables, more)


def test_a_run_does_not_choose_which_folder_is_read():
    network = new_network(dataset="folder:/etc")
    with pytest.raises(InputError, match="trained on folder:/etc: name the folder by `dataset`"):
        load_test_set(network, None, None)


def test_a_deep_stems_file_tells_its_channels(tmp_path):
    model = build_model("resnet18d", "torchvision")
    path = tmp_path / "weights.safetensors"
    variables = new_variables(new_network(model, image_shape=(28, 28, 3)))
    save_safetensors(path, to_torch(model, variables))
    network, _ = read_weights(path, "resnet18")
    assert network.model == model
    assert network.image_shape == (28, 28, 3)


def test_a_network_of_colours_sees_grey_pictures_in_three_equal_channels(tmp_path, monkeypatch):
    """In memory and, where they would fill it, from the disk."""
    root = write_classes(tmp_path / "pets", mode="L", size=(28, 28))
    network = new_network(image_shape=(28, 28, 3), image_size=28, classes=("cats", "dogs"))
    images = load_test_set(network, f"folder:{root}").images
    assert images.shape == (2, 28, 28, 3)
    assert (images == images[..., :1]).all()
    monkeypatch.setattr(sys.modules["resnet_flax.inference.evaluate"], "memory", lambda: 0)
    streamed = load_test_set(network, f"folder:{root}").images
    assert isinstance(streamed, LazyImages)
    np.testing.assert_array_equal(streamed[:], images)
