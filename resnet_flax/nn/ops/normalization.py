"""Sums over channels, biases and batch normalisation, precise and quick on a CPU too.

Every function gives the values of the plain JAX operation to rounding, in a formulation of its own
for CPUs and for accelerators. All have their own reverse-mode derivatives, in fewer passes over
memory than JAX would derive, and so no forward-mode ones (`jax.jvp`).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from resnet_flax.nn.ops.platform import barrier_on_cpu, choose

# XLA splits a longer sum in two on a CPU, and then takes twice as long.
LONGEST_SUM = 32


def channel_sum(x: Float[Array, "*axes C"]) -> Float[Array, " C"]:
    """Sum of (..., C) over all axes but the last."""
    return choose(x, cpu=_channel_sum_on_cpu, accelerator=_channel_sum)


def _channel_sum(x: jax.Array) -> jax.Array:
    return x.sum(tuple(range(x.ndim - 1)))


def _channel_sum_on_cpu(x: jax.Array) -> jax.Array:
    """One axis after the other.

    XLA adds all values in one running total: over the 589,824 of a channel after D2L's first
    convolution, float32 loses a digit, and every ReLU that flips for it changes gradients by
    percents (benchmarks/precision.py). Short sums keep the digit; the barriers keep them apart.
    """
    while x.ndim > 1:
        *outer, size, channels = x.shape
        parts = range(min(size, LONGEST_SUM), 0, -1)
        part = next((part for part in parts if size % part == 0), 1)
        if 1 < part < size:
            x = x.reshape(*outer, size // part, part, channels)
        x = lax.optimization_barrier(x.sum(-2))
    return x


def channel_sums(*arrays: Float[Array, "*axes C"]) -> Sequence[Float[Array, " C"]]:
    """The `channel_sum` of each of several arrays of one shape, on a GPU by one kernel."""

    def one_by_one(*arrays: jax.Array) -> Sequence[jax.Array]:
        return tuple(map(_channel_sum_on_cpu, arrays))

    return choose(*arrays, cpu=one_by_one, accelerator=_channel_sums)


def _channel_sums(*arrays: jax.Array) -> Sequence[jax.Array]:
    def add(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> Sequence[jax.Array]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
    return lax.reduce(arrays, zeros, add, range(arrays[0].ndim - 1))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(
    x: Float[Array, "*axes C"], bias: Float[Array, " C"], centred: bool = False
) -> Float[Array, "*axes C"]:
    """Adds (C,) to (..., C), in the dtype of ``x``; its gradient is a `channel_sum`.

    Args:
        x: (..., C).
        bias: (C,).
        centred: what follows takes each channel's mean away, so that the bias has no effect and
            its gradient is zero but for rounding. An accelerator then saves the sum: a pass over
            memory for each convolution.
    """
    return _add_bias_forward(x, bias, centred)[0]


def _add_bias_forward(x: jax.Array, bias: jax.Array, centred: bool) -> tuple[jax.Array, jax.Array]:
    # XLA would make the bias cuDNN's, and prepare it with a kernel for each convolution; behind
    # the barrier it is added where the sum is read.
    x = choose(x, cpu=lambda x: x, accelerator=lax.optimization_barrier)
    return x + bias.astype(x.dtype), bias


def _add_bias_backward(
    centred: bool, bias: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def add_up(gradient: jax.Array) -> jax.Array:
        return channel_sum(gradient.astype(bias.dtype))

    if not centred:
        return gradient, add_up(gradient)
    return gradient, choose(gradient, cpu=add_up, accelerator=lambda _: jnp.zeros_like(bias))


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_normalize(
    x: Float[Array, "*axes C"], scale: Float[Array, " C"], bias: Float[Array, " C"], epsilon: float
) -> tuple[Float[Array, "*axes C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalises by the batch's mean and biased variance (Ioffe & Szegedy, 2015, algorithm 1).

    Args:
        x: (..., C), of any dtype: it is kept as it is for the backward pass.
        scale: (C,).
        bias: (C,).
        epsilon: added to the variance before the square root.

    Returns:
        The normalised values (..., C), and the batch's mean and biased variance, each (C,), all in
        float32 at least. As in PyTorch, no gradient flows through the last two.
    """
    return _batch_normalize_forward(x, scale, bias, epsilon)[0]


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


# Compiled as functions of their own, both are traced once for all layers of the same shape.
@partial(jax.jit, static_argnums=3)
def _batch_normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Residuals]:
    wide = _wide(x)
    mean, var = choose(wide, cpu=_moments_in_two_passes, accelerator=_moments_in_one_pass)
    inverse = lax.rsqrt(var + epsilon)
    return ((wide - mean) * (scale * inverse) + bias, mean, var), (x, mean, inverse, scale)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _moments_in_two_passes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = x.size // x.shape[-1]
    mean = channel_sum(x) / count
    return mean, channel_sum(jnp.square(x - mean)) / count


def _moments_in_one_pass(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the differences to one of the values, which keeps the digits of a large mean."""
    count = x.size // x.shape[-1]
    shift = x[tuple(side // 2 for side in x.shape[:-1])]
    difference = x - shift
    total, squares = channel_sums(difference, jnp.square(difference))
    mean = total / count
    return mean + shift, jnp.maximum(squares / count - jnp.square(mean), 0)


@partial(jax.jit, static_argnums=0)
def _batch_normalize_backward(
    epsilon: float, residuals: Residuals, gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = residuals
    gradient = barrier_on_cpu(gradients[0])
    centred = _wide(x) - mean
    count = x.size // x.shape[-1]
    bias_gradient, product = channel_sums(gradient, gradient * centred)
    scale_gradient = product * inverse
    slope = scale_gradient / count * inverse
    input_gradient = (gradient - bias_gradient / count - centred * slope) * (scale * inverse)
    return input_gradient.astype(x.dtype), scale_gradient, bias_gradient


batch_normalize.defvjp(_batch_normalize_forward, _batch_normalize_backward)
