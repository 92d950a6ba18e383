"""The residual network, and the family: torchvision's, and timm's "D".

Submodules carry the names of torchvision's keys (``conv1``, ``layer1/0/bn2``, ``fc``), so that
weights convert by rule. What distinguishes D2L's network from torchvision's is data (`FLAVOURS`),
and so is the depth (`ARCHITECTURES`). What a field may be, and whether a saved network tells it,
stands at the field.

Sources: D2L, section "Residual Networks (ResNet)"; He et al., 2015 (arXiv:1512.03385).
"""

import dataclasses
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from resnet_flax.errors import InputError
from resnet_flax.nn.blocks import (
    Block,
    Bottleneck,
    DeepStem,
    ModuleFactory,
    Residual,
    Stage,
    normalized,
)
from resnet_flax.nn.fields import Module, require
from resnet_flax.nn.layers import (
    BatchNorm,
    Conv,
    Dense,
    kaiming_normal,
    pytorch_uniform,
    xavier_uniform,
)
from resnet_flax.nn.ops.normalization import at_least_float32
from resnet_flax.nn.ops.pooling import max_pool, max_pool_rectified
from resnet_flax.nn.preprocessing import check_shape

# Images scaled to [0, 1], or normalised to mean 0 and deviation 1, stay well below it; of those in
# 0..255 nearly all have a pixel above.
LARGEST_SCALED = 25.0
STEMS = {
    "imagenet": (7, 2, True),
    "cifar": (3, 1, False),
    "small": (3, 1, True),
    "deep": (3, 2, True),
}
"""Name -> (first kernel's side, its stride, whether 3x3 max pooling of stride 2 follows)."""
BLOCKS: dict[str, type[Block]] = {block.__name__: block for block in (Residual, Bottleneck)}
DTYPES = ("float32", "bfloat16")
"""Of a saved network's computation."""
MOST_STAGES, MOST_BLOCKS = 6, 200  # ResNet-152 has 4 and 50


def _field(default: Any, **metadata: Any) -> Any:
    """A field with what it may be: from ``low`` to ``high``, or one of the names ``choices``.

    ``saved=False``: it does not matter to a trained network, and its description leaves it out.
    ``later=True``: version 0.1.0 had it not, and what it wrote means the default.
    """
    return dataclasses.field(default=default, metadata=metadata)


class ResNet(Module):
    """A residual network: stem, stages of 64, 128, 256, ... channels, global pooling, dense layer.

    Call it as ``model.apply(variables, images, train=True, mutable=["batch_stats"])``. Fields that
    are not listed are those of `Block` and `BatchNorm`.

    Attributes:
        stage_sizes: number of blocks in each stage.
        block: `Residual` or `Bottleneck`.
        num_classes: classes; 0 leaves the dense layer out and returns the pooled features.
        use_bias: whether convolutions have a bias (D2L) or not (torchvision).
        norm_shortcut: whether a BN follows the shortcut's convolution (torchvision) or not (D2L).
        stem: "imagenet" (7x7, stride 2, then 3x3 max pool, stride 2), "cifar" (3x3, stride 1),
            "small" (3x3, stride 1, then 3x3 max pool, stride 2), or "deep" (as "imagenet", but
            three 3x3 of which the first has the stride; those but the last have half the channels).
        channels: of the stem and the first stage; each further stage has twice as many.
        replace_stride_with_dilation: for each stage after the first, whether its kernels are
            dilated twice as far in the place of its stride of 2, so that its output keeps its size,
            as dense prediction wants it; `Bottleneck` only. Empty for none. A pooled shortcut does
            not pool there (timm's with ``output_stride`` averages neighbours).
        stochastic_depth_rate: the last block's rate; it grows linearly from 0 at the first.
        conv_init: initialiser of the convolutions' kernels.
        dense_init: initialiser of the dense layer's kernel.
        frozen_stages: the first parts that stay in eval mode in training: 1 the stem, 2 the first
            stage too, and so on. `resnet_flax.training.recipes.freeze` keeps their parameters.
        normalization_groups: ``groups`` of each `BatchNorm`.
        dtype: dtype of the computation; logits come back in float32 at least.
        param_dtype: dtype of parameters and running statistics.

    Raises:
        InputError: when a field is of the wrong kind, or out of range.
    """

    stage_sizes: Sequence[int]
    block: type[Block] = _field(Residual, choices=BLOCKS)
    num_classes: int = _field(10, saved=False, low=0)
    use_bias: bool = True
    norm_shortcut: bool = False
    stem: str = _field("imagenet", choices={name: name for name in STEMS})
    channels: int = _field(64, low=1, high=4096)
    width_multiplier: float = _field(1.0, low=0.01, high=100.0)
    groups: int = _field(1, low=1, high=1024, later=True)
    width_per_group: int = _field(64, low=1, high=1024, later=True)
    replace_stride_with_dilation: Sequence[bool] = _field((), later=True)
    average_shortcut: bool = _field(False, later=True)
    stride_first: bool = False
    preactivation: bool = False
    zero_init_residual: bool = False
    dropout_rate: float = _field(0.0, low=0.0, high=1.0)
    stochastic_depth_rate: float = _field(0.0, low=0.0, high=1.0)
    conv_init: Initializer = _field(xavier_uniform, saved=False)
    dense_init: Initializer = _field(xavier_uniform, saved=False)
    frozen_stages: int = _field(0, saved=False, low=0)
    normalization_groups: int = _field(1, saved=False, low=1)
    momentum: float = _field(0.1, low=0.0, high=1.0)
    epsilon: float = _field(1e-5, low=0.0, high=1.0)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = _field(jnp.float32, saved=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes, replaced = self.stage_sizes, self.replace_stride_with_dilation
        fine = 1 <= len(sizes) <= MOST_STAGES and min(sizes) >= 1 and sum(sizes) <= MOST_BLOCKS
        require(fine, "stage_sizes", sizes)
        for field in dataclasses.fields(self):
            if "low" in field.metadata:
                value, limits = getattr(self, field.name), field.metadata
                require(limits["low"] <= value <= limits.get("high", math.inf), field.name, value)
        require(self.stem in STEMS, "stem", self.stem)
        fine = len(replaced) in (0, len(sizes) - 1)
        fine = fine and not (self.block is Residual and any(replaced))  # PyTorch's has none either
        require(fine, "replace_stride_with_dilation", replaced)
        # The block says what it has not.
        self.block(
            self.channels, groups=self.groups, width_per_group=self.width_per_group, parent=None
        )

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Part -> its variables' names: the stem, each stage, the pooling and the dense layer."""
        stages = {f"stage {n}": (f"layer{n}",) for n in range(1, len(self.stage_sizes) + 1)}
        return {
            "stem": ("conv1",) if self.preactivation else ("conv1", "bn1"),
            **stages,
            "global average pool": ("norm",) if self.preactivation else (),
            **({"dense": ("fc",)} if self.num_classes else {}),
        }

    @property
    def total_stride(self) -> int:
        """Pixels of the image, along an axis, to one value of the last stage's output."""
        _, strides, pooled = STEMS[self.stem]
        halved = [first == others for first, others in self.dilations[1:]]
        return strides * (2 if pooled else 1) * 2 ** sum(halved)

    @property
    def dilations(self) -> list[tuple[int, int]]:
        """Of each stage's first block and of its others; where they differ, its stride is 1."""
        factors = [2 if replaced else 1 for replaced in self.replace_stride_with_dilation]
        reached = accumulate([1, *(factors or [1] * (len(self.stage_sizes) - 1))], operator.mul)
        return list(pairwise([1, *reached]))

    @nn.compact
    def __call__(
        self, images: Float[Array, "N H W C"], train: bool = False, features: bool = False
    ) -> Float[Array, "N features"] | list[Float[Array, "N H2 W2 C2"]]:
        """Classifies images.

        Args:
            images: (N, H, W, C), floating point, in [0, 1].
            train: normalise by the batch's statistics and update the running ones.
            features: return the stages' outputs instead of the logits.

        Returns:
            Logits (N, num_classes); or pooled features (N, C'); or a list of feature maps, one
            (N, H', W', C') for each stage.

        Raises:
            ValueError: when ``images`` has a wrong shape or dtype.
        """
        check_network_input(images)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv: ModuleFactory = partial(
            Conv, use_bias=self.use_bias, kernel_init=self.conv_init, **dtypes
        )
        norm = partial(
            BatchNorm,
            momentum=self.momentum,
            epsilon=self.epsilon,
            groups=self.normalization_groups,
            **dtypes,
        )
        block = partial(
            self.block,
            norm_shortcut=self.norm_shortcut,
            average_shortcut=self.average_shortcut,
            width_multiplier=self.width_multiplier,
            groups=self.groups,
            width_per_group=self.width_per_group,
            stride_first=self.stride_first,
            preactivation=self.preactivation,
            zero_init_residual=self.zero_init_residual,
            dropout_rate=self.dropout_rate,
            conv=conv,
            norm=norm,
        )

        x = images.astype(self.dtype)
        learns = train and self.frozen_stages < 1
        size, strides, pooled = STEMS[self.stem]
        if self.stem == "deep":
            conv1 = partial(DeepStem(self.channels, conv, norm, name="conv1"), train=learns)
        else:
            conv1 = conv(self.channels, size, strides, size // 2, name="conv1")
        if self.preactivation:
            x = conv1(x)
            x = max_pool(x, 3, 2, 1) if pooled else x
        else:
            x = normalized(conv1, norm(name="bn1"), x, learns)
            x = max_pool_rectified(x) if pooled else nn.relu(x)

        maps = []
        rates = self.block_rates()
        for index, size in enumerate(self.stage_sizes):
            stage_rates, rates = rates[:size], rates[size:]
            x = Stage(
                self.channels * 2**index,
                size,
                index == 0,
                block,
                stage_rates,
                self.dilations[index],
                name=f"layer{index + 1}",
            )(x, train and self.frozen_stages < index + 2)
            maps.append(x)
        if features:
            return maps

        if self.preactivation:
            x = nn.relu(norm(name="norm")(x, train))
        # Pooling in float32: bfloat16 sums over a whole feature map lose digits.
        x = x.mean((1, 2), dtype=at_least_float32(x.dtype))
        if self.num_classes:
            x = Dense(self.num_classes, self.dense_init, **dtypes, name="fc")(x)
        return x.astype(at_least_float32(x.dtype))

    def block_rates(self) -> tuple[float, ...]:
        """Each block's stochastic depth rate, linear in its place (Huang et al., 2016, eq. 4)."""
        blocks = sum(self.stage_sizes)
        return tuple(self.stochastic_depth_rate * i / max(1, blocks - 1) for i in range(blocks))


# Small networks for Fashion-MNIST's 28x28 pixels, in three stages as He et al. (2015, section 4.2)
# have for CIFAR-10, but wider. They were chosen with Xavier's draws, whatever the flavour.
_SMALL = {"stem": "small", "conv_init": xavier_uniform, "dense_init": xavier_uniform}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet8": {"stage_sizes": (1, 1, 1), "channels": 32, **_SMALL},
    "resnet14": {"stage_sizes": (2, 2, 2), "channels": 64, **_SMALL},
    "resnet18": {"stage_sizes": (2, 2, 2, 2)},
    "resnet26": {"block": Bottleneck, "stage_sizes": (2, 2, 2, 2)},
    "resnet34": {"stage_sizes": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "stage_sizes": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "stage_sizes": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "stage_sizes": (3, 8, 36, 3)},
}
"""Name -> fields of `ResNet`: table 1 of He et al., 2015, and torchvision's and timm's names."""
_50, _101 = ARCHITECTURES["resnet50"], ARCHITECTURES["resnet101"]
_D = {"stem": "deep", "average_shortcut": True}  # the variant's letter in He et al., 2018
ARCHITECTURES |= {
    **{f"resnet{n}d": ARCHITECTURES[f"resnet{n}"] | _D for n in (18, 26, 34, 50, 101, 152)},
    "resnext50_32x4d": _50 | {"groups": 32, "width_per_group": 4},
    "resnext101_32x8d": _101 | {"groups": 32, "width_per_group": 8},
    "resnext101_64x4d": _101 | {"groups": 64, "width_per_group": 4},
    "wide_resnet50_2": _50 | {"width_per_group": 128},
    "wide_resnet101_2": _101 | {"width_per_group": 128},
}

FLAVOURS: dict[str, dict[str, Any]] = {
    "d2l": {
        "use_bias": True,
        "norm_shortcut": False,
        "conv_init": xavier_uniform,
        "dense_init": xavier_uniform,
    },
    "torchvision": {
        "use_bias": False,
        "norm_shortcut": True,
        "conv_init": kaiming_normal,
        "dense_init": pytorch_uniform,
    },
}
"""Name -> fields of `ResNet`: whose network it is, parameter for parameter."""


def build_model(name: str, flavour: str = "d2l", **fields: Any) -> ResNet:
    """Builds a network of the family.

    Args:
        name: a key of `ARCHITECTURES`.
        flavour: a key of `FLAVOURS`.
        **fields: further fields of `ResNet`, which win.

    Raises:
        InputError: when name or flavour is unknown.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"unknown model {name!r}: choose from {', '.join(ARCHITECTURES)}")
    if flavour not in FLAVOURS:
        raise InputError(f"unknown flavour {flavour!r}: choose from {', '.join(FLAVOURS)}")
    return ResNet(**FLAVOURS[flavour] | ARCHITECTURES[name] | fields)


def architecture(model: ResNet) -> tuple[str, str] | None:
    """Name and flavour of a network of the family, whatever its dtype; None of any other."""
    described = describe_model(model)
    for name in ARCHITECTURES:
        for flavour in FLAVOURS:
            if describe_model(build_model(name, flavour, dtype=model.dtype)) == described:
                return name, flavour
    return None


resnet18 = partial(build_model, "resnet18")
resnet34 = partial(build_model, "resnet34")
resnet50 = partial(build_model, "resnet50")
resnet101 = partial(build_model, "resnet101")
resnet152 = partial(build_model, "resnet152")


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
            "use resnet_flax.nn.prepare_images"
        )
    if isinstance(images, jax.core.Tracer) or not images.size:
        return
    largest = float(np.abs(np.asarray(images)).max())  # not traced where the images are not
    if largest > LARGEST_SCALED:
        warnings.warn(
            f"images should be in [0, 1], but a pixel is {largest:g}: divide them by 255",
            stacklevel=2,
        )


def describe_model(model: ResNet) -> dict[str, Any]:
    """What decides the function of a trained network, in JSON's types."""
    described: dict[str, Any] = {}
    for field in _saved_fields():
        value = getattr(model, field.name)
        if choices := field.metadata.get("choices"):
            value = next(name for name, choice in choices.items() if choice == value)
        described[field.name] = list(value) if isinstance(value, tuple) else value
    return described | {"dtype": jnp.dtype(model.dtype).name}


def model_from_description(description: Mapping[str, Any], num_classes: int) -> ResNet:
    """The inverse of `describe_model`, for a description from anywhere.

    Raises:
        InputError: when a field of version 0.1.0 is missing, or one is of the wrong kind or out of
            range.
    """
    fields: dict[str, Any] = {}
    for field in _saved_fields():
        name, value = field.name, description.get(field.name)
        if field.metadata.get("later") and name not in description:
            continue
        choices = {dtype: dtype for dtype in DTYPES} if name == "dtype" else None
        if choices := field.metadata.get("choices", choices):
            require(isinstance(value, str) and value in choices, name, value)
            value = choices[value]
        elif type(value) is not list:  # of NumPy's numbers and the like a file has none
            require(type(value) in (bool, int, float), name, value)
        fields[name] = value
    return ResNet(**fields, num_classes=num_classes)


def _saved_fields() -> list[dataclasses.Field[Any]]:
    own = (field for field in dataclasses.fields(ResNet) if field.name not in ("parent", "name"))
    return [field for field in own if field.metadata.get("saved", True)]
