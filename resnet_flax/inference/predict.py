"""A trained network's answers for many images: whole batches, one compiled shape."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from resnet_flax.errors import InputError
from resnet_flax.inference.pretrained import Network
from resnet_flax.nn.preprocessing import mirrored_logits, prepare_images

BATCH_SIZE = 256
BATCH_PIXELS = 4_000_000  # fewer images where they are large


def compute_logits(network: Network, variables: Any, images: np.ndarray) -> np.ndarray:
    """Classifies images, prepared as in training, in eval mode.

    Args:
        network: tells how to prepare them.
        variables: of ``network.model``.
        images: uint8, (N, H, W, C).

    Returns:
        float32, (N, classes).

    Raises:
        InputError: when a logit is not a finite number, since weights are not.
    """
    size = min(BATCH_SIZE, BATCH_PIXELS // network.image_size**2, max(1, len(images)))
    variables = jax.device_put(variables)
    logits = [np.zeros((0, len(network.classes)), np.float32)]
    for start in range(0, len(images), size):
        # The last batch is filled up; in eval mode no image touches another's logits.
        indices = np.minimum(np.arange(start, start + size), len(images) - 1)
        answer = _infer(
            network.model,
            variables,
            images[indices],
            image_size=network.image_size,
            flip=network.flip,
        )
        logits.append(np.asarray(answer)[: len(images) - start])
    joined = np.concatenate(logits)
    if not np.isfinite(joined).all():
        raise InputError("the network's outputs are not finite numbers: its weights are damaged")
    return joined


@partial(jax.jit, static_argnames=("model", "image_size", "flip"))
def _infer(
    model: nn.Module, variables: Any, images: jax.Array, *, image_size: int, flip: bool
) -> Any:
    images = prepare_images(images, image_size)
    return mirrored_logits(partial(model.apply, variables), images, flip)
