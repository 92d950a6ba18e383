"""The residual blocks and the stage: what the network repeats.

Images are NHWC. Submodules carry the names of torchvision's keys (``conv1``, ``bn2``,
``downsample/0``), so that weights convert by rule.

Sources: D2L, section "Residual Networks (ResNet)"; He et al., 2015 (arXiv:1512.03385) and, for
pre-activation, 2016 (arXiv:1603.05027).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Array, Float

from resnet_flax.nn.layers import BatchNorm, Conv

ModuleFactory = Callable[..., Any]


def normalized(conv: Any, norm: Any, x: jax.Array, train: bool) -> jax.Array:
    """``norm(conv(x), train)``, where `BatchNorm` takes away what the bias of `Conv` adds."""
    if type(norm) is BatchNorm and type(conv) is Conv:
        return norm(conv(x, centred=train), train)
    return norm(conv(x), train)


class Shortcut(nn.Module):
    """The 1x1 convolution that fits a block's input to its output, with or without a BN."""

    features: int
    strides: int
    norm_shortcut: bool
    conv: ModuleFactory
    norm: ModuleFactory

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N H2 W2 features"]:
        """Maps (N, H, W, C) to (N, ceil(H / strides), ceil(W / strides), features)."""
        conv = self.conv(self.features, 1, self.strides, name="0")
        return normalized(conv, self.norm(name="1"), x, train) if self.norm_shortcut else conv(x)


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
    def __call__(
        self, x: Float[Array, "N H W C"], train: bool = False
    ) -> Float[Array, "N H2 W2 features"]:
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
            y = nn.relu(normalized(conv1, bn2, y, train))
            return self.add(shortcut, conv2(self.dropout(y, train)), train)
        y = nn.relu(normalized(conv1, bn1, x, train))
        y = normalized(conv2, bn2, self.dropout(y, train), train)
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
    def __call__(
        self, x: Float[Array, "N H W C"], train: bool = False
    ) -> Float[Array, "N H2 W2 features"]:
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
            y = nn.relu(normalized(conv1, bn2, y, train))
            y = nn.relu(normalized(conv2, bn3, y, train))
            return self.add(shortcut, conv3(self.dropout(y, train)), train)
        y = nn.relu(normalized(conv1, bn1, x, train))
        y = nn.relu(normalized(conv2, bn2, y, train))
        y = normalized(conv3, bn3, self.dropout(y, train), train)
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
    def __call__(
        self, x: Float[Array, "N H W C"], train: bool = False
    ) -> Float[Array, "N H2 W2 features"]:
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
