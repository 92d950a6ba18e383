"""The residual network: its blocks, its stages, and the family from ResNet-18 to ResNet-152.

Images are NHWC. Submodules carry the names of torchvision's keys (``conv1``, ``layer1/0/bn2``,
``layer2/0/downsample/0``, ``fc``), so that weights convert by rule. What distinguishes D2L's
network from torchvision's is data (`FLAVOURS`), and so is the depth (`ARCHITECTURES`).

Sources: D2L, section "Residual Networks (ResNet)"; He et al., 2015 (arXiv:1512.03385) and, for
pre-activation, 2016 (arXiv:1603.05027).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax.nn import initializers

from resnet_flax.errors import InputError
from resnet_flax.layers import (
    BatchNorm,
    Conv,
    Dense,
    kaiming_normal,
    max_pool,
    pytorch_uniform,
    xavier_uniform,
)

ModuleFactory = Callable[..., Any]


class Shortcut(nn.Module):
    """The 1x1 convolution that fits a block's input to its output, with or without a BN."""

    features: int
    strides: int
    norm_shortcut: bool
    conv: ModuleFactory
    norm: ModuleFactory

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / strides), ceil(W / strides), features)."""
        x = self.conv(self.features, 1, self.strides, name="0")(x)
        return self.norm(name="1")(x, train) if self.norm_shortcut else x


class Block(nn.Module):
    """What `Residual` and `Bottleneck` share: their fields, and how branch and shortcut join.

    Attributes:
        num_channels: channels of the block's 3x3 convolution, before ``width_multiplier``.
        use_1x1conv: whether the shortcut is a 1x1 convolution instead of the identity.
        strides: step of the block, in pixels.
        norm_shortcut: whether a BN follows the shortcut's convolution (torchvision) or not (D2L).
        width_multiplier: factor on the channels of the 3x3 convolutions (Wide-ResNet).
        stride_first: a `Bottleneck` takes its stride in the first 1x1 convolution (He et al.,
            2015, "v1") instead of the 3x3 (torchvision, "v1.5"); a `Residual` has no choice.
        preactivation: BN and ReLU before each convolution instead of after (He et al., 2016).
        zero_init_residual: the last BN's scale starts at zero, so that the block starts as the
            identity (Goyal et al., 2017).
        dropout_rate: share of the activations dropped before the last convolution in training.
        stochastic_depth_rate: probability with which a sample skips the branch in training
            (Huang et al., 2016). Both rates need a random key named ``dropout``.
        conv: makes the convolutions: `Conv` or a partial of it.
        norm: makes the batch normalisations: `BatchNorm` or a partial of it.
    """

    num_channels: int
    use_1x1conv: bool = False
    strides: int = 1
    norm_shortcut: bool = False
    width_multiplier: float = 1.0
    stride_first: bool = False
    preactivation: bool = False
    zero_init_residual: bool = False
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    conv: ModuleFactory = Conv
    norm: ModuleFactory = BatchNorm

    @property
    def width(self) -> int:
        """Channels of the 3x3 convolutions."""
        return int(self.num_channels * self.width_multiplier)

    @property
    def features(self) -> int:
        """Channels of the output."""
        raise NotImplementedError

    def last_norm(self, name: str) -> Any:
        """The branch's last BN, whose scale may start at zero."""
        scale_init = initializers.zeros if self.zero_init_residual else initializers.ones
        return self.norm(name=name, scale_init=scale_init)

    def dropout(self, x: jax.Array, train: bool) -> jax.Array:
        """Drops activations in training; without a rate, returns ``x``."""
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)

    def shortcut(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns ``x``, through the 1x1 convolution where there is one."""
        if not self.use_1x1conv:
            return x
        return Shortcut(
            self.features,
            self.strides,
            self.norm_shortcut,
            self.conv,
            self.norm,
            name="downsample",
        )(x, train)

    def add(self, shortcut: jax.Array, branch: jax.Array, train: bool) -> jax.Array:
        """Adds the branch to the shortcut; each sample may skip it in training.

        Raises:
            ValueError: when the shapes differ (a shortcut of one channel would broadcast).
        """
        if shortcut.shape != branch.shape:
            raise ValueError(
                f"{type(self).__name__}({self.num_channels}): the input, {shortcut.shape}, cannot "
                f"be added to the branch's output, {branch.shape}; set use_1x1conv=True"
            )
        one_draw_per_sample = tuple(range(1, branch.ndim))
        skip = nn.Dropout(self.stochastic_depth_rate, broadcast_dims=one_draw_per_sample)
        return shortcut + skip(branch, deterministic=not train)


class Residual(Block):
    """D2L's residual block: two 3x3 convolutions, each with a BN, and a shortcut around both.

    As in D2L, ``Residual(3)`` keeps the shape of a (4, 6, 6, 3) input, and
    ``Residual(6, use_1x1conv=True, strides=2)`` turns it into (4, 3, 3, 6). The attributes are
    those of `Block`.
    """

    @property
    def features(self) -> int:
        """Channels of the output."""
        return self.width

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / strides), ceil(W / strides), features).

        Raises:
            ValueError: when the input cannot be added to the branch's output.
        """
        conv1 = self.conv(self.width, 3, self.strides, 1, name="conv1")
        conv2 = self.conv(self.features, 3, 1, 1, name="conv2")
        bn1, bn2 = self.norm(name="bn1"), self.last_norm("bn2")
        if self.preactivation:
            y = nn.relu(bn1(x, train))
            shortcut = self.shortcut(y, train) if self.use_1x1conv else x
            y = nn.relu(bn2(conv1(y), train))
            return self.add(shortcut, conv2(self.dropout(y, train)), train)
        y = nn.relu(bn1(conv1(x), train))
        y = bn2(conv2(self.dropout(y, train)), train)
        return nn.relu(self.add(self.shortcut(x, train), y, train))


class Bottleneck(Block):
    """The deeper networks' block: a 3x3 convolution between two 1x1, the last four times as wide.

    The attributes are those of `Block`.
    """

    @property
    def features(self) -> int:
        """Channels of the output."""
        return 4 * self.num_channels

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / strides), ceil(W / strides), 4 * num_channels).

        Raises:
            ValueError: when the input cannot be added to the branch's output.
        """
        first, second = (self.strides, 1) if self.stride_first else (1, self.strides)
        conv1 = self.conv(self.width, 1, first, name="conv1")
        conv2 = self.conv(self.width, 3, second, 1, name="conv2")
        conv3 = self.conv(self.features, 1, name="conv3")
        bn1, bn2, bn3 = self.norm(name="bn1"), self.norm(name="bn2"), self.last_norm("bn3")
        if self.preactivation:
            y = nn.relu(bn1(x, train))
            shortcut = self.shortcut(y, train) if self.use_1x1conv else x
            y = nn.relu(bn2(conv1(y), train))
            y = nn.relu(bn3(conv2(y), train))
            return self.add(shortcut, conv3(self.dropout(y, train)), train)
        y = nn.relu(bn1(conv1(x), train))
        y = nn.relu(bn2(conv2(y), train))
        y = bn3(conv3(self.dropout(y, train)), train)
        return nn.relu(self.add(self.shortcut(x, train), y, train))


class Stage(nn.Module):
    """D2L's ``resnet_block``: ``num_residuals`` blocks; the first may halve height and width.

    Attributes:
        num_channels: channels of the blocks' 3x3 convolutions.
        num_residuals: number of blocks.
        first_block: the network's first stage, which keeps height and width.
        block: makes the blocks: `Residual`, `Bottleneck` or a partial of either.
        stochastic_depth_rates: one rate for each block; empty for none.
    """

    num_channels: int
    num_residuals: int
    first_block: bool = False
    block: ModuleFactory = Residual
    stochastic_depth_rates: Sequence[float] = ()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (N, H, W, C) to (N, H', W', C'), H' = ceil(H / 2) unless ``first_block``."""
        rates = self.stochastic_depth_rates or (0.0,) * self.num_residuals
        for index, rate in enumerate(rates):
            strides = 2 if index == 0 and not self.first_block else 1
            fields = {"strides": strides, "stochastic_depth_rate": rate, "name": str(index)}
            # A detached copy tells the block's output channels, which decide about the shortcut.
            features = self.block(self.num_channels, parent=None).features
            use_1x1conv = strides != 1 or x.shape[-1] != features
            x = self.block(self.num_channels, use_1x1conv=use_1x1conv, **fields)(x, train)
        return x


class ResNet(nn.Module):
    """A residual network: stem, stages of 64, 128, 256, ... channels, global pooling, dense layer.

    Call it as ``model.apply(variables, images, train=True, mutable=["batch_stats"])``.

    Attributes:
        stage_sizes: number of blocks in each stage.
        block: `Residual` or `Bottleneck`.
        num_classes: classes; 0 leaves the dense layer out and returns the pooled features.
        use_bias: whether convolutions have a bias (D2L) or not (torchvision).
        norm_shortcut: whether a BN follows the shortcut's convolution (torchvision) or not (D2L).
        stem: "imagenet" (7x7, stride 2, then 3x3 max pool, stride 2) or "cifar" (3x3, stride 1).
        width_multiplier: see `Block`.
        stride_first: see `Block`.
        preactivation: see `Block`.
        zero_init_residual: see `Block`.
        dropout_rate: see `Block`.
        stochastic_depth_rate: the last block's rate; it grows linearly from 0 at the first.
        conv_init: initialiser of the convolutions' kernels.
        dense_init: initialiser of the dense layer's kernel.
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
    width_multiplier: float = 1.0
    stride_first: bool = False
    preactivation: bool = False
    zero_init_residual: bool = False
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    conv_init: Initializer = xavier_uniform
    dense_init: Initializer = xavier_uniform
    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, features: bool = False
    ) -> jax.Array | list[jax.Array]:
        """Classifies images.

        Args:
            images: (N, H, W, C), floating point, in [0, 1].
            train: normalise by the batch's statistics and update the running ones.
            features: return the stages' outputs instead of the logits.

        Returns:
            Logits (N, num_classes); or pooled features (N, C'); or a list of feature maps, one
            (N, H', W', C') for each stage.

        Raises:
            ValueError: when ``images`` is not 4-dimensional, or ``stem`` is unknown.
        """
        if images.ndim != 4:
            raise ValueError(f"images must have shape (N, H, W, C), not {images.shape}")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv: ModuleFactory = partial(Conv, use_bias=self.use_bias, kernel_init=self.conv_init, **dtypes)
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
        if self.stem == "imagenet":
            x = conv(64, 7, 2, 3, name="conv1")(x)
        elif self.stem == "cifar":
            x = conv(64, 3, 1, 1, name="conv1")(x)
        else:
            raise ValueError(f"stem must be 'imagenet' or 'cifar', not {self.stem!r}")
        if not self.preactivation:
            x = nn.relu(norm(name="bn1")(x, train))
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, 1)

        maps = []
        rates = self.block_rates()
        for index, size in enumerate(self.stage_sizes):
            stage_rates, rates = rates[:size], rates[size:]
            x = Stage(
                64 * 2**index, size, index == 0, block, stage_rates, name=f"layer{index + 1}"
            )(x, train)
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
        """The stochastic depth rate of each block, growing linearly to the last (Huang et al., 2016, eq. 4)."""
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
    return ResNet(stage_sizes, block, **{**FLAVOURS[flavour], **fields})


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
