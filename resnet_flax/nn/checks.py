"""What callers most often get wrong, said before it costs a run.

Shapes and dtypes are known when JAX traces a function; values are not, so that they are looked at
only where they are at hand: outside `jax.jit`.
"""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax.errors import InputError

# Images scaled to [0, 1], or normalised to mean 0 and deviation 1, stay well below it; of those in
# 0..255 nearly all have a pixel above.
LARGEST_SCALED = 25.0


def check_shape(images: Any) -> None:
    """Makes sure that images are (N, H, W, C).

    Raises:
        ValueError: when they have not four axes, or look like PyTorch's (N, C, H, W).
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, H, W, C), not {images.shape}")
    _, first, second, third = images.shape
    if first in (1, 3) and second == third > 4:
        raise ValueError(
            f"images must have shape (N, H, W, C); {images.shape} looks like PyTorch's "
            "(N, C, H, W): transpose by (0, 2, 3, 1)"
        )


def check_network_input(images: Any) -> None:
    """Makes sure that images are (N, H, W, C), floating point, and not in 0..255.

    Raises:
        ValueError: when their shape or dtype is wrong.

    Warns:
        UserWarning: when their values, if at hand, are too large.
    """
    check_shape(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point in [0, 1], not {images.dtype}: divide them by 255, or "
            "use resnet_flax.preprocessing.prepare_images"
        )
    if isinstance(images, jax.core.Tracer) or not images.size:
        return
    largest = float(np.abs(np.asarray(images)).max())  # not traced where the images are not
    if largest > LARGEST_SCALED:
        warnings.warn(
            f"images should be in [0, 1], but a pixel is {largest:g}: divide them by 255",
            stacklevel=2,
        )


def check_examples(images: Any, labels: Any) -> None:
    """Makes sure that a data set is uint8 images (N, H, W, C) and integer labels (N,).

    Raises:
        ValueError: naming the argument, what it is, and what it must be.
    """
    check_shape(images)
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 in 0..255, not {images.dtype}")
    if labels.ndim == 2:
        raise ValueError(
            f"labels must be integers of shape (N,), not of shape {labels.shape}: of one-hot "
            "labels take labels.argmax(-1)"
        )
    if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {images.shape[:1]}, one for each image, not "
            f"{labels.dtype} of shape {labels.shape}"
        )


def check_label_range(labels: Any, num_classes: int) -> None:
    """Makes sure that labels are among 0, 1, ..., num_classes - 1.

    Raises:
        ValueError: when one is not; the cross-entropy would silently be wrong.
    """
    labels = np.asarray(labels)
    smallest, largest = labels.min(), labels.max()
    if smallest < 0 or largest >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1} for {num_classes} classes, not in "
            f"{smallest}..{largest}"
        )


def check_channels(layer: str, x: jax.Array, kernel: jax.Array) -> None:
    """Makes sure that a convolution's input has the channels that its kernel (H, W, I, O) takes.

    Raises:
        ValueError: when it has not.
    """
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"{layer}: the input must have shape (N, H, W, {kernel.shape[2]}), not {x.shape}; the "
            f"parameters were made for {kernel.shape[2]} channels"
        )


def check_batches(batches: list[np.ndarray], image_size: int) -> None:
    """Makes sure that the smallest batch can be normalised in the network's last stage.

    Args:
        batches: index arrays.
        image_size: height and width of the images, in pixels.

    Raises:
        InputError: when that stage would hold a single value per channel.
    """
    if min(map(len, batches)) * math.ceil(image_size / 32) ** 2 < 2:
        raise InputError(
            f"the last batch would hold 1 image of {image_size}x{image_size} pixels, too few for "
            "batch normalisation: change --batch-size, --train-examples or --image-size"
        )
