"""How to train, as data: D2L's recipe, one for speed, and one for accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key


@dataclass(frozen=True, eq=False)  # compared as an object, so that compiled steps can depend on it
class Recipe:
    """Everything about a run that is not its data.

    Attributes:
        epochs: default of ``--epochs``.
        batch_size: default of ``--batch-size``.
        learning_rate: default of ``--learning-rate``; the largest, where it changes.
        image_size: default of ``--image-size``, in pixels.
        model_fields: fields of `resnet_flax.ResNet` that differ from D2L's network.
        one_cycle: the rate rises to ``learning_rate`` and falls to nearly 0 (Smith, 2018,
            arXiv:1803.09820), instead of being constant.
        momentum: of SGD; with Nesterov's look-ahead.
        weight_decay: share of each kernel added to its gradient, as in `torch.optim.SGD`.
        label_smoothing: share of each label spread over all classes (Szegedy et al., 2016).
        shift: pixels by which training images are moved at most, along each axis.
        flip: mirror half of the training images, and average each test image with its mirror image.
        average_decay: weight of the past in the running average of parameters and statistics that
            is evaluated and saved; 0 for none.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    image_size: int
    model_fields: Mapping[str, Any] = field(default_factory=dict)
    one_cycle: bool = False
    momentum: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    shift: int = 0
    flip: bool = False
    average_decay: float = 0.0

    def flags(self) -> dict[str, Any]:
        """The flags of ``train.py`` that it sets where the user does not."""
        names = ("epochs", "batch_size", "learning_rate", "image_size")
        return {name: getattr(self, name) for name in names}


RECIPES = {
    # D2L, section "Residual Networks (ResNet)", Training.
    "d2l": Recipe(epochs=10, batch_size=256, learning_rate=0.05, image_size=96),
    # Chosen by the accuracy on the last 5,000 training images of a run on the others.
    "fast": Recipe(
        epochs=10,
        batch_size=128,
        learning_rate=0.15,
        image_size=28,
        model_fields={
            "stem": "small",
            "channels": 32,
            "stage_sizes": (1, 1, 1),
            "use_bias": False,
            "norm_shortcut": True,
        },
        one_cycle=True,
        momentum=0.9,
        weight_decay=5e-4,
        label_smoothing=0.05,
        shift=1,
        flip=True,
        average_decay=0.995,
    ),
    # The same at four times the width and depth.
    "best": Recipe(
        epochs=30,
        batch_size=128,
        learning_rate=0.15,
        image_size=28,
        model_fields={
            "stem": "small",
            "channels": 64,
            "stage_sizes": (2, 2, 2),
            "use_bias": False,
            "norm_shortcut": True,
        },
        one_cycle=True,
        momentum=0.9,
        weight_decay=5e-4,
        label_smoothing=0.1,
        shift=2,
        flip=True,
        average_decay=0.998,
    ),
}
"""Name -> recipe."""


def build_optimizer(
    recipe: Recipe, learning_rate: float, steps: int
) -> optax.GradientTransformation:
    """The recipe's SGD.

    Args:
        recipe: decides schedule, momentum and weight decay.
        learning_rate: the largest.
        steps: of the whole run.
    """
    if not recipe.one_cycle:
        return optax.sgd(learning_rate)
    schedule = optax.cosine_onecycle_schedule(steps, learning_rate, pct_start=0.2)
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, _kernels),
        optax.sgd(schedule, recipe.momentum, nesterov=True),
    )


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def augment(
    key: Key[Array, ""], images: Float[Array, "N H W C"], recipe: Recipe
) -> Float[Array, "N H W C"]:
    """Shifts and mirrors each of the images (N, H, W, C) at random, on the device."""
    flip_key, shift_key = jax.random.split(key)
    if recipe.flip:
        flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if recipe.shift:
        margin = ((0, 0), (recipe.shift, recipe.shift), (recipe.shift, recipe.shift), (0, 0))
        offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * recipe.shift + 1)

        def window(padded: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(padded, (*offset, 0), images.shape[1:])

        images = jax.vmap(window)(jnp.pad(images, margin), offsets)
    return images


def moving_average(recipe: Recipe, average: Any, new: Any, step: jax.Array) -> Any:
    """One step of the exponential moving average; in the first steps it forgets faster."""
    decay = jnp.minimum(recipe.average_decay, (1 + step) / (10 + step))
    updated = optax.incremental_update(new, average, 1 - decay)
    # Rounding must not move the average of what stays the same: frozen parts keep their bits.
    return jax.tree.map(lambda a, b, c: jnp.where(a == b, a, c), average, new, updated)
