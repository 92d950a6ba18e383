"""How to train, as data: as D2L, for speed, for accuracy, from other weights, on ImageNet."""

from dataclasses import dataclass
from typing import Any, Literal

import chex
import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from resnet_flax.errors import InputError
from resnet_flax.nn.resnet import ResNet


@dataclass(frozen=True)
class Recipe:
    """Everything about a run that is not its data; what `defaults` has is its flags' defaults.

    Attributes:
        epochs: passes over the training set.
        batch_size: images in a step.
        learning_rate: the largest, where it changes.
        image_size: height and width that images are resized to, in pixels.
        model: key of `resnet_flax.ARCHITECTURES`.
        flavour: key of `resnet_flax.FLAVOURS`.
        optimizer: ``sgd``, plain and at one rate; or, at a rate that rises to ``learning_rate`` and
            falls to nearly 0 (one cycle: Smith, 2018, arXiv:1803.09820), ``nesterov``, SGD with
            Nesterov's momentum, or ``muon`` for the convolutions' kernels (Jordan et al., 2024,
            https://kellerjordan.github.io/posts/muon), which makes each one's mean gradient an
            orthogonal matrix, and Adam for the rest; or ``momentum``, PyTorch's SGD at a rate that
            rises over the ``warm_up`` from 1% of ``learning_rate`` to it, and falls to 0 as a
            cosine.
        momentum: weight of the past in the mean gradient.
        weight_decay: share of a convolution's kernel that Muon's step takes off it, times the rate;
            with ``momentum``, share of a kernel that is added to its gradient.
        warm_up: share of the steps; of ``momentum`` alone.
        scaled_rate: where only the batch size is given, the rate grows with it (Goyal et al., 2017,
            arXiv:1706.02677).
        adam_share: Adam's rate as a share of Muon's.
        label_smoothing: share of each label spread over all classes (Szegedy et al., 2016).
        random_resized_crop: least share of the area of a training image that a random crop keeps;
            0 for none (`resnet_flax.nn.preprocessing.augment`).
        shift: pixels by which training images are moved at most, along each axis.
        flip: mirror half of the training images.
        crop_share: side of the middle that is kept of a picture, as a share of its shorter side,
            where pictures are made square for the network and no pretrained one tells how; at 1
            they become squares as of `resnet_flax.data.image_files`.
        flip_test: average each test image's logits with those of its mirror image.
        erase: share of the training images in which a rectangle becomes noise (Zhong et al., 2017).
        average_decay: weight of the past in the running average of parameters and statistics that
            is evaluated and saved; 0 for none.
        dtype: of the computation.
        normalization: ``imagenet``, or None for none.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    image_size: int
    model: str
    flavour: str
    optimizer: Literal["sgd", "nesterov", "muon", "momentum"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.02
    warm_up: float = 0.0
    scaled_rate: bool = False
    adam_share: float = 1 / 6
    label_smoothing: float = 0.0
    random_resized_crop: float = 0.0
    shift: int = 0
    flip: bool = False
    crop_share: float = 1.0
    flip_test: bool = False
    erase: float = 0.0
    average_decay: float = 0.0
    dtype: str = "float32"
    normalization: str | None = None

    def defaults(self, batch_size: int | None = None) -> dict[str, Any]:
        """What a run takes from it where it is not told, at a batch size if that is told."""
        names = ("epochs", "batch_size", "learning_rate", "image_size", "model", "flavour")
        values = {name: getattr(self, name) for name in (*names, "dtype", "normalization")}
        if self.scaled_rate and batch_size:
            values["learning_rate"] *= batch_size / self.batch_size
        return values

    def step_options(self) -> dict[str, Any]:
        """Keyword arguments of `resnet_flax.training.train_step`."""
        augmentation = ("random_resized_crop", "shift", "flip", "erase")
        names = ("label_smoothing", *augmentation, "average_decay")
        return {name: getattr(self, name) for name in names}


RECIPES = {
    # D2L, section "Residual Networks (ResNet)", Training.
    "d2l": Recipe(
        epochs=10,
        batch_size=256,
        learning_rate=0.05,
        image_size=96,
        model="resnet18",
        flavour="d2l",
    ),
    # Chosen by the accuracy on the last 5,000 training images of a run on the others.
    "fast": Recipe(
        epochs=10,
        batch_size=128,
        learning_rate=0.03,
        image_size=28,
        model="resnet8",
        flavour="torchvision",
        optimizer="muon",
        label_smoothing=0.05,
        shift=1,
        flip=True,
        flip_test=True,
        average_decay=0.995,
    ),
    # At twice the width and depth: three minutes of a GPU, or a working day of two cores.
    "best": Recipe(
        epochs=100,
        batch_size=256,
        learning_rate=0.03,
        image_size=28,
        model="resnet14",
        flavour="torchvision",
        optimizer="muon",
        label_smoothing=0.1,
        shift=2,
        flip=True,
        flip_test=True,
        erase=0.3,
        average_decay=0.998,
    ),
    # For weights from elsewhere; scored plainly, as whoever gets the network back scores it.
    "finetune": Recipe(
        epochs=10,
        batch_size=32,
        learning_rate=0.01,
        image_size=224,
        model="resnet18",
        flavour="torchvision",
        optimizer="nesterov",
        label_smoothing=0.1,
        random_resized_crop=0.25,
        flip=True,
    ),
    # torchvision's references/classification/train.py, with the warm-up and the mixed precision
    # that it offers; the warm-up is by steps, as in Goyal et al., 2017, section 2.2.
    "imagenet": Recipe(
        epochs=90,
        batch_size=256,
        learning_rate=0.1,
        image_size=224,
        model="resnet50",
        flavour="torchvision",
        optimizer="momentum",
        weight_decay=1e-4,
        warm_up=5 / 90,
        scaled_rate=True,
        label_smoothing=0.1,
        random_resized_crop=0.08,
        flip=True,
        crop_share=0.875,
        dtype="bfloat16",
        normalization="imagenet",
    ),
}
"""Name -> recipe."""


def build_optimizer(
    recipe: Recipe, learning_rate: float, steps: int
) -> optax.GradientTransformation:
    """The recipe's optimiser, for a run of so many steps; the rate is the largest."""
    if recipe.optimizer == "sgd":
        return optax.sgd(learning_rate)

    def one_cycle(largest: float) -> optax.Schedule:
        return optax.cosine_onecycle_schedule(steps, largest, pct_start=0.2)

    if recipe.optimizer == "nesterov":
        return optax.sgd(one_cycle(learning_rate), recipe.momentum, nesterov=True)
    if recipe.optimizer == "momentum":
        warm_up = round(recipe.warm_up * steps)
        rate = optax.warmup_cosine_decay_schedule(
            0.01 * learning_rate, learning_rate, warm_up, decay_steps=steps
        )
        decay = optax.add_decayed_weights(recipe.weight_decay, mask=_kernels)
        return optax.chain(decay, optax.sgd(rate, recipe.momentum))
    return muon(
        one_cycle(learning_rate),
        beta=recipe.momentum,
        weight_decay=recipe.weight_decay,
        adam_learning_rate=one_cycle(recipe.adam_share * learning_rate),
        muon_weight_dimension_numbers=_kernels_as_matrices,
    )


def _kernels(params: chex.ArrayTree) -> chex.ArrayTree:
    """Which they are: the other parameters, biases and scales, have one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _kernels_as_matrices(params: Any) -> Any:
    """From (H, W, C, features) to (H * W * C, features); what has fewer axes is for Adam."""
    matrix = MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return jax.tree.map(lambda leaf: matrix if leaf.ndim == 4 else None, params)


def freeze(optimizer: optax.GradientTransformation, model: ResNet) -> optax.GradientTransformation:
    """Keeps the parameters of the model's ``frozen_stages`` as they are, to the bit.

    The compiler leaves out the gradients that nothing needs, so that a frozen part costs its
    forward pass only.

    Raises:
        InputError: when there are not as many parts.
    """
    if not model.frozen_stages:
        return optimizer
    parts = list(model.parts.values())[: 1 + len(model.stage_sizes)]
    if model.frozen_stages > len(parts):
        raise InputError(
            f"`freeze_stages` must be at most {len(parts)}, the stem and {len(parts) - 1} stages, "
            f"not {model.frozen_stages}"
        )
    frozen = {name for names in parts[: model.frozen_stages] for name in names}
    return optax.multi_transform(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: {name: "frozen" if name in frozen else "trained" for name in params},
    )
