"""What a network makes of images, in arrays and in files."""

import sys

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_flax.data.image_files import read_images
from resnet_flax.errors import InputError
from resnet_flax.inference.predict import compute_logits, predict
from resnet_flax.inference.scores import softmax
from tests.support.finished_run import (
    MODEL,
    new_network,
    new_variables,
    random_images,
    write_pretrained,
)
from tests.support.image_files import random_image


def test_many_images_are_one_compiled_shape_in_full_batches(shared_run, tmp_path, monkeypatch):
    folder, network, variables, _ = shared_run
    paths = [tmp_path / f"{number}.png" for number in range(600)]
    images = random_images(600, seed=2).images
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path, compress_level=0)
    shapes = []
    module = sys.modules["resnet_flax.inference.predict"]  # not the function of that name
    infer = module._infer

    def note(model, variables, images, *others):
        shapes.append(images.shape)
        return infer(model, variables, images, *others)

    monkeypatch.setattr(module, "_infer", note)
    predictions = predict(folder, paths)
    assert shapes == [(256, 28, 28, 1)] * 3
    assert [each.image for each in predictions] == list(map(str, paths))
    alone = softmax(compute_logits(network, variables, images[555:556]))[0]
    name, share = predictions[555].top[0]
    assert name == network.classes[alone.argmax()]
    np.testing.assert_allclose(share, alone.max(), rtol=1e-4)


def test_the_answers_are_those_of_training(shared_run):
    """Mirrored, where the recipe does so; and prepared as there."""
    data = random_images(7)
    network = new_network(image_size=32, flip=True)
    variables = new_variables(network)
    plain = compute_logits(new_network(image_size=32), variables, data.images)
    mirrored = compute_logits(new_network(image_size=32), variables, data.images[:, :, ::-1])
    averaged = compute_logits(network, variables, data.images)
    np.testing.assert_allclose(averaged, (plain + mirrored) / 2, rtol=1e-4, atol=1e-5)
    resized = [Image.fromarray(image[..., 0]).resize((32, 32), 2) for image in data.images]
    inputs = np.stack(resized)[..., None] / np.float32(255)
    np.testing.assert_allclose(jax.jit(MODEL.apply)(variables, inputs), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_photo_is_fitted_as_the_training_images_were(fit, tmp_path):
    (tmp_path / "run").mkdir()
    network = new_network(image_shape=(28, 28, 3), fit=fit)
    variables = write_pretrained(tmp_path / "run", network)
    path = tmp_path / "lying.png"
    random_image(0, (60, 30)).save(path)
    trained, _ = read_images([path], 28)
    shares = softmax(compute_logits(network, variables, trained))[0]
    (found,) = predict(tmp_path / "run", [path])
    expected = [(network.classes[i], shares[i]) for i in np.argsort(-shares)[:3]]
    assert (found.top == expected) == (fit == "crop")


def test_no_images_and_damaged_weights(shared_run):
    folder, network, variables, data = shared_run
    assert predict(folder, []) == []
    damaged = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    with pytest.raises(InputError, match="outputs are not finite"):
        compute_logits(network, damaged, data.images)


def test_channels_that_no_file_has(tmp_path):
    write_pretrained(tmp_path, new_network(image_shape=(28, 28, 2)))
    with pytest.raises(InputError, match="takes images of 2 channels"):
        predict(tmp_path, [])
