"""D2L's ResNet-18 as one would write it from Flax's own layers: what `throughput` compares with.

The padding and BN's constants are PyTorch's, so that the work is the same; nothing is tuned.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class PlainResidual(nn.Module):
    """Two 3x3 convolutions and a shortcut, or 1x1, 3x3, 1x1 as a bottleneck."""

    features: int
    strides: int
    bottleneck: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / strides, W / strides, features or four times as many)."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        conv = partial(nn.Conv, dtype=self.dtype)
        outputs = self.features * (4 if self.bottleneck else 1)
        y = x
        if self.bottleneck:
            y = nn.relu(norm()(conv(self.features, (1, 1))(y)))
        strides = (self.strides, self.strides)
        y = nn.relu(norm()(conv(self.features, (3, 3), strides, padding=1)(y)))
        last = (1, 1) if self.bottleneck else (3, 3)
        y = norm()(conv(outputs, last, padding=0 if self.bottleneck else 1)(y))
        if x.shape != y.shape:
            x = conv(outputs, (1, 1), strides)(x)
        return nn.relu(x + y)


class PlainResNet(nn.Module):
    """Stem, four stages, pooling and a dense layer."""

    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (N, H, W, C) to logits (N, 10)."""
        x = nn.Conv(64, (7, 7), (2, 2), padding=3, dtype=self.dtype)(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x = nn.relu(norm(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1)] * 2)
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                strides = 2 if stage > 0 and block == 0 else 1
                x = PlainResidual(64 * 2**stage, strides, self.bottleneck, self.dtype)(x, train)
        return nn.Dense(10)(x.mean((1, 2), dtype=jnp.float32))
