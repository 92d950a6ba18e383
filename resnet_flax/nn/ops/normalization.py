"""Sums over channels, biases and batch normalisation, precise and quick on a CPU too.

Every function gives the values of the plain JAX operation to rounding, in a formulation of its own
for CPUs and for accelerators. Backward passes are our own, in fewer passes over memory than JAX
would derive.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from resnet_flax.nn.ops.derivatives import Arrays, linear, vary_alike
from resnet_flax.nn.ops.platform import barrier_on_cpu, choose

# XLA splits a longer sum in two on a CPU, and then takes twice as long.
LONGEST_SUM = 32


def at_least_float32(dtype: Any) -> Any:
    """The dtype in which sums keep their digits."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def per_channel(values: Float[Array, " C"], x: Float[Array, "*axes C"]) -> Float[Array, "*ones C"]:
    """(C,) as (1, ..., 1, C), of the rank of ``x``."""
    return lax.expand_dims(values, range(x.ndim - 1))


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
        known = size if isinstance(size, int) else 1  # an exported program takes any number
        parts = range(min(known, LONGEST_SUM), 0, -1)
        part = next((part for part in parts if size % part == 0), 1)
        if 1 < part < known:
            x = x.reshape(*outer, size // part, part, channels)
        x = lax.optimization_barrier(x.sum(-2))
    return x


def channel_sums(*arrays: Float[Array, "*axes C"]) -> Sequence[Float[Array, " C"]]:
    """The `channel_sum` of each of several arrays of one shape, on a GPU all at once."""

    def one_by_one(*arrays: jax.Array) -> Sequence[jax.Array]:
        return tuple(map(_channel_sum_on_cpu, arrays))

    return choose(*arrays, cpu=one_by_one, accelerator=_channel_sums)


def _channel_sums(*arrays: jax.Array) -> Sequence[jax.Array]:
    def add(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> Sequence[jax.Array]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
    # Each image's first: of one long sum per channel, few of a GPU's processors do all the work,
    # and XLA then computes what is summed in a kernel before, in float32 (27 us for one layer).
    axes = range(arrays[0].ndim - 1)
    sums = lax.reduce(arrays, zeros, add, axes[1:])
    return lax.reduce(sums, zeros, add, axes[:1])


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
    x, bias = vary_alike(x, bias)
    return _add_bias(x, bias, centred)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _add_bias(x: jax.Array, bias: jax.Array, centred: bool) -> jax.Array:
    # XLA would make the bias cuDNN's, and prepare it with a kernel for each convolution; behind
    # the barrier it is added where the sum is read.
    x = choose(x, cpu=lambda x: x, accelerator=lax.optimization_barrier)
    return _sum((), (x, bias))


def _sum(_: Arrays, terms: Arrays) -> jax.Array:
    x, bias = terms
    return x + per_channel(bias.astype(x.dtype), x)


@_add_bias.defjvp
def _add_bias_differentiate(
    centred: bool, inputs: Arrays, tangents: Arrays
) -> tuple[jax.Array, jax.Array]:
    dtype = inputs[1].dtype  # and no more of the inputs: what outlives this call would leak them

    def backward(_: Arrays, gradient: jax.Array) -> Arrays:
        return gradient, to_bias(gradient)

    def add_up(gradient: jax.Array) -> jax.Array:
        return channel_sum(gradient.astype(dtype))

    def nothing(gradient: jax.Array) -> jax.Array:
        return lax.full_like(gradient, 0, dtype, gradient.shape[-1:])

    to_bias = partial(choose, cpu=add_up, accelerator=nothing) if centred else add_up
    return _add_bias(*inputs, centred), linear(_sum, backward, (), tangents)


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
    dtype = at_least_float32(x.dtype)
    x, scale, bias = vary_alike(x, scale.astype(dtype), bias.astype(dtype))
    return _batch_normalize(x, scale, bias, epsilon)


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _batch_normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _batch_normalize_forward(x, scale, bias, epsilon)[0]


@_batch_normalize.defjvp
def _batch_normalize_differentiate(
    epsilon: float, inputs: Arrays, tangents: Arrays
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    outputs, residuals = _batch_normalize_forward(*inputs, epsilon)
    _, mean, var = outputs
    tangent = linear(_batch_normalize_tangent, _batch_normalize_backward, residuals, tangents)
    return outputs, (tangent, jnp.zeros_like(mean), jnp.zeros_like(var))


# Compiled as functions of their own, they are traced once for all layers of the same shape.
@partial(jax.jit, static_argnums=3)
def _batch_normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Residuals]:
    wide = _wide(x)
    mean, var = choose(wide, cpu=_moments_in_two_passes, accelerator=_moments_in_one_pass)
    inverse = lax.rsqrt(var + epsilon)
    normal = (wide - per_channel(mean, x)) * per_channel(scale * inverse, x)
    return (normal + per_channel(bias, x), mean, var), (x, mean, inverse, scale)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))


def _moments_in_two_passes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = x.size // x.shape[-1]
    mean = channel_sum(x) / count
    return mean, channel_sum(jnp.square(x - per_channel(mean, x))) / count


def _moments_in_one_pass(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the differences to one of the values, which keeps the digits of a large mean."""
    count = x.size // x.shape[-1]
    sides = (side if isinstance(side, int) else 1 for side in x.shape[:-1])
    shift = x[tuple(side // 2 for side in sides)]
    difference = x - per_channel(shift, x)
    total, squares = channel_sums(difference, jnp.square(difference))
    mean = total / count
    return mean + shift, jnp.maximum(squares / count - jnp.square(mean), 0)


@jax.jit
def _batch_normalize_tangent(residuals: Arrays, tangents: Arrays) -> jax.Array:
    x, mean, inverse, scale = residuals
    x_tangent, scale_tangent, bias_tangent = tangents
    x_tangent, centred = _wide(x_tangent), _wide(x) - per_channel(mean, x)
    count = x.size // x.shape[-1]
    shift, product = (total / count for total in channel_sums(x_tangent, x_tangent * centred))
    factor = scale * inverse
    slope = scale_tangent * inverse - factor * jnp.square(inverse) * product
    return (
        x_tangent * per_channel(factor, x)
        + centred * per_channel(slope, x)
        + per_channel(bias_tangent - shift * factor, x)
    )


@jax.jit
def _batch_normalize_backward(
    residuals: Residuals, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = residuals
    gradient = barrier_on_cpu(gradient)
    centred = _wide(x) - per_channel(mean, x)
    count = x.size // x.shape[-1]
    bias_gradient, product = channel_sums(gradient, gradient * centred)
    scale_gradient = product * inverse
    shift = per_channel(bias_gradient / count, x)
    slope = per_channel(scale_gradient / count * inverse, x)
    input_gradient = (gradient - shift - centred * slope) * per_channel(scale * inverse, x)
    return input_gradient.astype(x.dtype), scale_gradient, bias_gradient
