"""The residual blocks and the stage: what the network repeats.

Images are NHWC. Submodules carry the names of torchvision's keys (``conv1``, ``bn2``,
``downsample/0``), so that weights convert by rule.

Sources: D2L, section "Residual Networks (ResNet)"; He et al., 2015 (arXiv:1512.03385) and, for
pre-activation, 2016 (arXiv:1603.05027); Xie et al., 2016 (arXiv:1611.05431) for groups; another He
et al., 2018 (arXiv:1812.01187) for the deep stem and the pooled shortcut.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Array, Float

from resnet_flax.errors import InputError
from resnet_flax.nn.fields import Module
from resnet_flax.nn.layers import BatchNorm, Conv
from resnet_flax.nn.ops.pooling import average_pool

ModuleFactory = Callable[..., Any]


def normalized(conv: Any, norm: Any, x: jax.Array, train: bool) -> jax.Array:
    """``norm(conv(x), train)``, where `BatchNorm` takes away what the bias of `Conv` adds."""
    if type(norm) is BatchNorm and type(conv) is Conv:
        return norm(conv(x, centred=train), train)
    return norm(conv(x), train)


class DeepStem(Module):
    """Three 3x3 convolutions in the place of the 7x7 (He et al., 2018), the first of stride 2.

    Those but the last have half the channels, and a BN and a ReLU of their own. The layers have
    the numbers that they have in timm's ``Sequential``.
    """

    channels: int
    conv: ModuleFactory
    norm: ModuleFactory

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N H2 W2 channels"]:
        """Maps (N, H, W, C) to (N, ceil(H / 2), ceil(W / 2), channels)."""
        half = (self.channels + 1) // 2
        for number, strides in ((0, 2), (3, 1)):
            conv = self.conv(half, 3, strides, 1, name=f"{number}")
            x = nn.relu(normalized(conv, self.norm(name=f"{number + 1}"), x, train))
        return self.conv(self.channels, 3, 1, 1, name="6")(x)


class Shortcut(Module):
    """The 1x1 convolution that fits a block's input to its output, with or without a BN.

    An average pooling in the place of its stride has the number 0, as in timm's ``Sequential``.
    """

    features: int
    strides: int
    norm_shortcut: bool
    average_shortcut: bool
    conv: ModuleFactory
    norm: ModuleFactory

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N H2 W2 features"]:
        """Maps (N, H, W, C) to (N, ceil(H / strides), ceil(W / strides), features)."""
        strides, number = self.strides, 0
        if self.average_shortcut:
            x = average_pool(x, strides) if strides > 1 else x
            strides, number = 1, 1
        conv = self.conv(self.features, 1, strides, name=f"{number}")
        if not self.norm_shortcut:
            return conv(x)
        return normalized(conv, self.norm(name=f"{number + 1}"), x, train)


class Block(Module):
    """What `Residual` and `Bottleneck` share: their fields, and how branch and shortcut join.

    Attributes:
        num_channels: channels of the block's 3x3 convolution, before ``width_multiplier``.
        use_1x1conv: whether the shortcut is a 1x1 convolution instead of the identity.
        strides: step of the block, in pixels.
        norm_shortcut: whether a BN follows the shortcut's convolution (torchvision) or not (D2L).
        average_shortcut: the shortcut takes its stride by average pooling (He et al., 2018, "D").
        width_multiplier: factor on the channels of the 3x3 convolutions, and so of a `Residual`'s
            output (Zagoruyko & Komodakis, 2016); a `Bottleneck` has ``width_per_group`` for it.
        groups: of a `Bottleneck`'s 3x3 convolution (ResNeXt: Xie et al., 2016).
        width_per_group: channels of each group in a block of 64: a `Bottleneck`'s 3x3 convolution
            has ``int(num_channels * width_multiplier * width_per_group / 64) * groups`` in all.
            128 is torchvision's ``wide_resnet50_2``.
        dilation: distance of the pixels of a `Bottleneck`'s 3x3 kernel (Yu & Koltun, 2015).
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
    average_shortcut: bool = False
    width_multiplier: float = 1.0
    groups: int = 1
    width_per_group: int = 64
    dilation: int = 1
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
        per_group = self.num_channels * self.width_multiplier * self.width_per_group / 64
        return int(per_group) * self.groups

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
            self.average_shortcut,
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

    Raises:
        InputError: when it is asked for what PyTorch's has not: groups, or dilation.
    """

    def __post_init__(self) -> None:
        for name, only in (("groups", 1), ("width_per_group", 64), ("dilation", 1)):
            if getattr(self, name) != only:
                found = f"{name} cannot be {getattr(self, name)!r}"
                raise InputError(f"{found} in a Residual, as in PyTorch's: take a Bottleneck")
        super().__post_init__()

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
        # Said where there are any: a convolution from elsewhere may have other words for them.
        given = {"groups": self.groups, "dilation": self.dilation}
        given = {name: value for name, value in given.items() if value != 1}
        conv2 = self.conv(self.width, 3, second, self.dilation, name="conv2", **given)
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


class Stage(Module):
    """D2L's ``resnet_block``: ``num_residuals`` blocks; the first may halve height and width.

    Attributes:
        num_channels: channels of the blocks' 3x3 convolutions.
        num_residuals: number of blocks.
        first_block: the network's first stage, which keeps height and width.
        block: makes the blocks: `Residual`, `Bottleneck` or a partial of either.
        stochastic_depth_rates: one rate for each block; empty for none.
        dilations: of the first block, and of the others; where they differ, dilation stands in
            the place of the stride, which is 1.
    """

    num_channels: int
    num_residuals: int
    first_block: bool = False
    block: ModuleFactory = Residual
    stochastic_depth_rates: Sequence[float] = ()
    dilations: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(
        self, x: Float[Array, "N H W C"], train: bool = False
    ) -> Float[Array, "N H2 W2 features"]:
        """Maps (N, H, W, C) to (N, H', W', C'), H' = ceil(H / 2) where its stride is 2."""
        rates = self.stochastic_depth_rates or (0.0,) * self.num_residuals
        first, others = self.dilations
        keeps_size = self.first_block or first != others
        for index, rate in enumerate(rates):
            strides = 2 if index == 0 and not keeps_size else 1
            fields = {"strides": strides, "stochastic_depth_rate": rate, "name": str(index)}
            if (dilation := others if index else first) != 1:
                fields["dilation"] = dilation
            # A detached copy tells the block's output channels, which decide about the shortcut.
            features = self.block(self.num_channels, parent=None).features
            use_1x1conv = strides != 1 or x.shape[-1] != features
            x = self.block(self.num_channels, use_1x1conv=use_1x1conv, **fields)(x, train)
        return x
