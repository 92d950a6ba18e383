"""What a trained network makes of images, in files and in arrays."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float32

from resnet_flax.data import Photo, read_photos
from resnet_flax.errors import InputError
from resnet_flax.inference.pretrained import Network, read_pretrained
from resnet_flax.inference.scores import softmax
from resnet_flax.nn.preprocessing import Normalization, mirrored_logits, prepare_images

BATCH_SIZE = 256
BATCH_PIXELS = 4_000_000  # fewer images where they are large


class Prediction(NamedTuple):
    """What a network makes of one image."""

    image: str  # its path
    inverted: bool  # whether it had a bright background and was inverted
    top: list[tuple[str, float]]  # classes with their probabilities, the likeliest first


def predict(
    where: str | os.PathLike[str], images: Sequence[str | os.PathLike[str]], top: int = 3
) -> list[Prediction]:
    """Classifies image files by a network's folder or name, each by its likeliest classes.

    Files are PNG or JPEG, of any size. They are made as the training images were: for Fashion-MNIST
    grey, small, and light on dark, so that a photo on a white ground is inverted.

    Raises:
        InputError: when the network or any of the images cannot be read.
    """
    network, variables = read_pretrained(where)
    return classify(network, variables, images, top)


def classify(
    network: Network, variables: Any, images: Sequence[str | os.PathLike[str]], top: int = 3
) -> list[Prediction]:
    """As `predict`, by a network that has been read."""
    photos, pixels = _photos(network, images)
    predictions = []
    probabilities = softmax(compute_logits(network, variables, pixels))
    for path, photo, shares in zip(images, photos, probabilities, strict=True):
        best = (-shares).argsort(kind="stable")[:top]
        answers = [(network.classes[index], float(shares[index])) for index in best]
        predictions.append(Prediction(os.fspath(path), photo.inverted, answers))
    return predictions


def read_images(
    network: Network, images: Sequence[str | os.PathLike[str]]
) -> Float32[Array, "N H W C"]:
    """Image files as a network takes them: resized, cropped, scaled and normalised as in training.

    ``model.apply(variables, read_images(network, files))`` are the logits.

    Returns:
        float32, (N, image_size, image_size, C).

    Raises:
        InputError: when any of the images cannot be read.
    """
    _, pixels = _photos(network, images)
    return prepare_images(jnp.asarray(pixels), network.image_size, network.normalization)


def compute_logits(network: Network, variables: Any, images: np.ndarray) -> np.ndarray:
    """Classifies images, prepared as in training, in whole batches of one compiled shape.

    From uint8 (N, H, W, C) to float32 (N, classes).

    Raises:
        InputError: when a logit is not a finite number, since weights are not.
    """
    size = min(BATCH_SIZE, BATCH_PIXELS // network.image_size**2, max(1, len(images)))
    variables = jax.device_put(variables)
    logits = [np.zeros((0, len(network.classes)), np.float32)]
    for start in range(0, len(images), size):
        # The last batch is filled up; in eval mode no image touches another's logits.
        indices = np.minimum(np.arange(start, start + size), len(images) - 1)
        batch = images[indices]
        answers = _infer(
            network.model,
            variables,
            batch,
            network.image_size,
            network.flip,
            network.normalization,
        )
        logits.append(np.asarray(answers)[: len(images) - start])
    joined = np.concatenate(logits)
    if not np.isfinite(joined).all():
        raise InputError("the network's outputs are not finite numbers: its weights are damaged")
    return joined


def _photos(
    network: Network, images: Sequence[str | os.PathLike[str]]
) -> tuple[list[Photo], np.ndarray]:
    """Files as the network's data set has its images, and their pixels in one array."""
    if (channels := network.image_shape[-1]) not in (1, 3):
        raise InputError(f"the network takes images of {channels} channels: files have 1 or 3")
    photos = read_photos(
        images,
        network.image_shape,
        fit=network.fit,
        dark_background=network.dark_background,
        resizing=network.resizing,
    )
    pixels = np.asarray([photo.pixels for photo in photos], np.uint8)
    return photos, pixels.reshape(-1, *network.image_shape)  # of no photo too


@partial(jax.jit, static_argnames=("model", "image_size", "flip", "normalization"))
def _infer(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    image_size: int,
    flip: bool,
    normalization: Normalization | None,
) -> jax.Array:
    images = prepare_images(images, image_size, normalization)
    return mirrored_logits(partial(model.apply, variables), images, flip)
