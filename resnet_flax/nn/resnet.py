"""The residual network, and the family from ResNet-18 to ResNet-152.

Submodules carry the names of torchvision's keys (``conv1``, ``layer1/0/bn2``, ``fc``), so that
weights convert by rule. What distinguishes D2L's network from torchvision's is data (`FLAVOURS`),
and so is the depth (`ARCHITECTURES`).

Sources: D2L, section "Residual Networks (ResNet)"; He et al., 2015 (arXiv:1512.03385).
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from resnet_flax.errors import InputError
from resnet_flax.nn.blocks import Block, Bottleneck, ModuleFactory, Residual, Stage
from resnet_flax.nn.layers import (
    BatchNorm,
    Conv,
    Dense,
    kaiming_normal,
    pytorch_uniform,
    xavier_uniform,
)
from resnet_flax.nn.ops.pooling import max_pool
from resnet_flax.nn.preprocessing import check_shape

# Images scaled to [0, 1], or normalised to mean 0 and deviation 1, stay well below it; of those in
# 0..255 nearly all have a pixel above.
LARGEST_SCALED = 25.0
STEMS = {"imagenet": (7, 2, True), "cifar": (3, 1, False), "small": (3, 1, True)}
"""Name -> (kernel's side, its stride, whether 3x3 max pooling of stride 2 follows)."""


class ResNet(nn.Module):
    """A residual network: stem, stages of 64, 128, 256, ... channels, global pooling, dense layer.

    Call it as ``model.apply(variables, images, train=True, mutable=["batch_stats"])``.

    Attributes:
        stage_sizes: number of blocks in each stage.
        block: `Residual` or `Bottleneck`.
        num_classes: classes; 0 leaves the dense layer out and returns the pooled features.
        use_bias: whether convolutions have a bias (D2L) or not (torchvision).
        norm_shortcut: whether a BN follows the shortcut's convolution (torchvision) or not (D2L).
        stem: "imagenet" (7x7, stride 2, then 3x3 max pool, stride 2), "cifar" (3x3, stride 1), or
            "small" (3x3, stride 1, then 3x3 max pool, stride 2).
        channels: of the stem and the first stage; each further stage has twice as many.
        width_multiplier: see `Block`.
        stride_first: see `Block`.
        preactivation: see `Block`.
        zero_init_residual: see `Block`.
        dropout_rate: see `Block`.
        stochastic_depth_rate: the last block's rate; it grows linearly from 0 at the first.
        conv_init: initialiser of the convolutions' kernels.
        dense_init: initialiser of the dense layer's kernel.
        frozen_stages: the first parts that stay in eval mode in training: 1 the stem, 2 the first
            stage too, and so on. `resnet_flax.training.recipes.freeze` keeps their parameters.
        momentum: see `BatchNorm`.
        epsilon: see `BatchNorm`.
        dtype: dtype of the computation; logits come back in float32 at least.
        param_dtype: dtype of parameters and running statistics.
    """

    stage_sizes: Sequence[int]
    block: type[Block] = Residual
    num_classes: int = 10
    use_bias: bool = True
    norm_shortcut: bool = False
    stem: str = "imagenet"
    channels: int = 64
    width_multiplier: float = 1.0
    stride_first: bool = False
    preactivation: bool = False
    zero_init_residual: bool = False
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    conv_init: Initializer = xavier_uniform
    dense_init: Initializer = xavier_uniform
    frozen_stages: int = 0
    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

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
            ValueError: when ``images`` has a wrong shape or dtype, or ``stem`` is unknown.
        """
        check_network_input(images)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv: ModuleFactory = partial(
            Conv, use_bias=self.use_bias, kernel_init=self.conv_init, **dtypes
        )
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, **dtypes)
        block = partial(
            self.block,
            norm_shortcut=self.norm_shortcut,
            width_multiplier=self.width_multiplier,
            stride_first=self.stride_first,
            preactivation=self.preactivation,
            zero_init_residual=self.zero_init_residual,
            dropout_rate=self.dropout_rate,
            conv=conv,
            norm=norm,
        )

        x = images.astype(self.dtype)
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, not {self.stem!r}")
        size, strides, pooled = STEMS[self.stem]
        x = conv(self.channels, size, strides, size // 2, name="conv1")(x)
        if not self.preactivation:
            x = nn.relu(norm(name="bn1")(x, train and self.frozen_stages < 1))
        if pooled:
            x = max_pool(x, 3, 2, 1)

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
                name=f"layer{index + 1}",
            )(x, train and self.frozen_stages < index + 2)
            maps.append(x)
        if features:
            return maps

        if self.preactivation:
            x = nn.relu(norm(name="norm")(x, train))
        # Pooling in float32: bfloat16 sums over a whole feature map lose digits.
        x = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        if self.num_classes:
            x = Dense(self.num_classes, self.dense_init, **dtypes, name="fc")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def block_rates(self) -> tuple[float, ...]:
        """Each block's stochastic depth rate, linear in its place (Huang et al., 2016, eq. 4)."""
        blocks = sum(self.stage_sizes)
        return tuple(self.stochastic_depth_rate * i / max(1, blocks - 1) for i in range(blocks))


ARCHITECTURES: dict[str, tuple[type[Block], tuple[int, ...]]] = {
    "resnet18": (Residual, (2, 2, 2, 2)),
    "resnet34": (Residual, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Name -> (block, blocks in each stage): table 1 of He et al., 2015."""

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
        **fields: further fields of `ResNet`; they win over the flavour's.

    Raises:
        InputError: when name or flavour is unknown.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"unknown model {name!r}: choose from {', '.join(ARCHITECTURES)}")
    if flavour not in FLAVOURS:
        raise InputError(f"unknown flavour {flavour!r}: choose from {', '.join(FLAVOURS)}")
    block, stage_sizes = ARCHITECTURES[name]
    chosen: dict[str, Any] = (
        {"stage_sizes": stage_sizes, "block": block} | FLAVOURS[flavour] | fields
    )
    return ResNet(**chosen)


def resnet18(flavour: str = "d2l", **fields: Any) -> ResNet:
    """ResNet-18, D2L's network; arguments as in `build_model`."""
    return build_model("resnet18", flavour, **fields)


def resnet34(flavour: str = "d2l", **fields: Any) -> ResNet:
    """ResNet-34; arguments as in `build_model`."""
    return build_model("resnet34", flavour, **fields)


def resnet50(flavour: str = "d2l", **fields: Any) -> ResNet:
    """ResNet-50, of bottleneck blocks; arguments as in `build_model`."""
    return build_model("resnet50", flavour, **fields)


def resnet101(flavour: str = "d2l", **fields: Any) -> ResNet:
    """ResNet-101, of bottleneck blocks; arguments as in `build_model`."""
    return build_model("resnet101", flavour, **fields)


def resnet152(flavour: str = "d2l", **fields: Any) -> ResNet:
    """ResNet-152, of bottleneck blocks; arguments as in `build_model`."""
    return build_model("resnet152", flavour, **fields)


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
