"""Convolution, batch normalisation and dense layer with PyTorch's semantics, in NHWC.

Flax's own layers differ from PyTorch's in padding at stride 2, default initialisers, the meaning of
``momentum`` and the running variance; these three are what the network is built from instead.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float

from resnet_flax.nn.fields import Module
from resnet_flax.nn.ops.convolution import convolve
from resnet_flax.nn.ops.normalization import (
    add_bias,
    at_least_float32,
    batch_normalize,
    per_channel,
)


# Initialisers are functions of a module, so that a network that holds them can be pickled.
def xavier_uniform(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier's: D2L's `train_ch6` draws every convolution and dense kernel from it."""
    return initializers.xavier_uniform()(key, shape, dtype)


def kaiming_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """He's normal distribution over fan-out: torchvision draws convolutions from it, and ..."""
    return initializers.variance_scaling(2.0, "fan_out", "normal")(key, shape, dtype)


def pytorch_uniform(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """... leaves its dense layer at PyTorch's default, uniform in +-1/sqrt(fan_in)."""
    return initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def uniform_bias(fan_in: int) -> Initializer:
    """PyTorch's default bias: uniform in +-1/sqrt(fan_in), whatever the kernel's initialiser."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(Module):
    """2-D convolution as ``torch.nn.Conv2d``: a square kernel, explicit symmetric padding.

    Flax's ``padding="SAME"`` pads only the bottom and right edges at stride 2; PyTorch's integer
    padding pads all four, so the two give different outputs of the same shape.

    Attributes:
        features: number of output channels.
        kernel_size: side of the square kernel, in pixels.
        strides: step of the kernel, in pixels, along both axes.
        padding: zeros added on each of the four edges, in pixels.
        dilation: distance of the kernel's pixels, along both axes.
        groups: parts of the channels that are convolved apart; divides in and features.
        use_bias: whether a bias of shape (features,) is added.
        kernel_init: initialiser of the kernel, shape (kernel_size, kernel_size, in / groups,
            features).
        dtype: dtype of the computation and the output.
        param_dtype: dtype of the parameters.
    """

    features: int
    kernel_size: int
    strides: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: Initializer = xavier_uniform
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N H W C"], centred: bool = False
    ) -> Float[Array, "N H2 W2 features"]:
        """Convolves (N, H, W, C) into (N, H', W', features), H' = (H + 2p - d(k - 1) - 1) // s + 1.

        Args:
            x: (N, H, W, C).
            centred: a batch normalisation in training follows, for which the bias makes no
                difference; see `resnet_flax.nn.ops.normalization.add_bias`.

        Raises:
            ValueError: when the parameters were made for another C.
        """
        if self.has_variable("params", "kernel"):
            known: jax.Array = self.get_variable("params", "kernel")
            check_channels("/".join(self.path), x, known, self.groups)
        size, channels = self.kernel_size, x.shape[-1] // self.groups
        kernel = self.param(
            "kernel", self.kernel_init, (size, size, channels, self.features), self.param_dtype
        )
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = convolve(x, kernel, self.strides, self.padding, self.dilation)
        if self.use_bias:
            bias_init = uniform_bias(channels * size * size)
            bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
            y = add_bias(y, bias, centred)
        return y


class Dense(Module):
    """Dense layer as ``torch.nn.Linear``; the kernel is (in, features), PyTorch's transposed.

    Attributes:
        features: number of output features.
        kernel_init: initialiser of the kernel; the bias is uniform in +-1/sqrt(in).
        dtype: dtype of the computation and the output.
        param_dtype: dtype of the parameters.
    """

    features: int
    kernel_init: Initializer = xavier_uniform
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N inputs"]) -> Float[Array, "N features"]:
        """Maps (N, in) to (N, features)."""
        inputs = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features), self.param_dtype)
        bias = self.param("bias", uniform_bias(inputs), (self.features,), self.param_dtype)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return y + per_channel(bias.astype(self.dtype), y)


class BatchNorm(Module):
    """Batch normalisation over N, H and W as ``torch.nn.BatchNorm2d`` (Ioffe & Szegedy, 2015).

    In training the batch is normalised by its own mean and *biased* variance, while the running
    variance is updated with the *unbiased* one (n / (n - 1)), as PyTorch does and Flax does not.
    Statistics are computed in float32 at least, whatever ``dtype``.

    The running statistics are the collection ``batch_stats`` (``mean``, ``var``, each (C,)): pass
    ``mutable=["batch_stats"]`` to ``apply`` when ``train=True``.

    Attributes:
        groups: parts of the batch, along its first axis, that are normalised each by its own
            statistics in training ("ghost batches": Hoffer et al., 2017, arXiv:1705.08741); the
            running ones get their mean. On many devices each waits for its group's alone. A batch
            that does not divide into parts of several values each is one part.
        momentum: weight of the *new* batch in the running statistics, PyTorch's convention
            (PyTorch's 0.1 is ``momentum=0.9`` of ``flax.linen.BatchNorm``).
        epsilon: added to the variance before the square root.
        scale_init: initialiser of the scale; zeros turn a residual block into the identity.
        dtype: dtype of the output.
        param_dtype: dtype of scale, bias and running statistics.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    scale_init: Initializer = initializers.ones
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*axes C"], train: bool = False) -> Float[Array, "*axes C"]:
        """Normalises (..., C) over all axes but the last.

        Raises:
            ValueError: in training with one value per channel, whose variance is undefined, or
                without ``mutable=["batch_stats"]``.
        """
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,), self.param_dtype)
        bias = self.param("bias", initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable(
            "batch_stats", "mean", jnp.zeros, (channels,), self.param_dtype
        )
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), self.param_dtype)

        if train:
            if not self.is_mutable_collection("batch_stats"):
                raise ValueError(
                    "train=True updates the running statistics: pass mutable to apply, as in "
                    "logits, updates = model.apply(variables, images, train=True, "
                    'mutable=["batch_stats"])'
                )
            count = x.size // channels
            if count < 2 and not self.is_initializing():
                raise ValueError(
                    "BatchNorm needs more than one value per channel when train=True, but the "
                    f"input has shape {x.shape}: use a larger batch or image"
                )
            apart = x.shape[0] % self.groups == 0 and count > self.groups > 1
            if apart:
                parts = x.reshape(self.groups, -1, *x.shape[1:])
                normalize = partial(batch_normalize, epsilon=self.epsilon)
                y, mean, var = jax.vmap(normalize, (0, None, None))(parts, scale, bias)
                y, mean, var = y.reshape(x.shape), mean.mean(0), var.mean(0)
                count //= self.groups
            else:
                y, mean, var = batch_normalize(x, scale, bias, self.epsilon)
            if not self.is_initializing():
                rate = self.momentum
                unbiased_var = var * (count / (count - 1))
                running_mean.value = (1 - rate) * running_mean.value + rate * mean
                running_var.value = (1 - rate) * running_var.value + rate * unbiased_var
        else:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            wide = x.astype(at_least_float32(x.dtype))
            centred = wide - per_channel(running_mean.value, x)
            y = centred * per_channel(factor, x) + per_channel(bias, x)
        return y.astype(self.dtype)


def check_channels(layer: str, x: jax.Array, kernel: jax.Array, groups: int = 1) -> None:
    """Makes sure that a convolution's input has the channels that its kernel (H, W, I, O) takes.

    Raises:
        ValueError: when it has not.
    """
    channels = kernel.shape[2] * groups
    if x.shape[-1] != channels:
        raise ValueError(
            f"{layer}: the input must have shape (N, H, W, {channels}), not {x.shape}; the "
            f"parameters were made for {channels} channels"
        )
