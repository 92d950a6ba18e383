"""Sums over channels, biases and batch normalisation, precise and quick on a CPU too.

Every function gives the values of the plain JAX operation to float32 rounding. Where a CPU needs
another formulation, `jax.lax.platform_dependent` chooses when the program is compiled, so that GPUs
and TPUs keep the compiler's own. All have their own reverse-mode derivatives, in fewer passes over
memory than JAX would derive, and so no forward-mode ones (`jax.jvp`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# XLA splits a longer sum in two on a CPU, and then takes twice as long.
LONGEST_SUM = 32


def channel_sum(x: Float[Array, "*axes C"]) -> Float[Array, " C"]:
    """Sum of (..., C) over all axes but the last."""
    return lax.platform_dependent(x, cpu=_channel_sum_on_cpu, default=_channel_sum)


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


@jax.custom_vjp
def add_bias(x: Float[Array, "*axes C"], bias: Float[Array, " C"]) -> Float[Array, "*axes C"]:
    """Adds (C,) to (..., C), in the dtype of ``x``; its gradient is a `channel_sum`."""
    return _add_bias_forward(x, bias)[0]


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x + bias.astype(x.dtype), bias


def _add_bias_backward(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, channel_sum(gradient.astype(bias.dtype))


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_normalize(
    x: Float[Array, "*axes C"], scale: Float[Array, " C"], bias: Float[Array, " C"], epsilon: float
) -> tuple[Float[Array, "*axes C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalises by the batch's mean and biased variance (Ioffe & Szegedy, 2015, algorithm 1).

    Args:
        x: (..., C), float32 or float64.
        scale: (C,).
        bias: (C,).
        epsilon: added to the variance before the square root.

    Returns:
        The normalised values (..., C), and the batch's mean and biased variance, each (C,). As in
        PyTorch, no gradient flows through these two.
    """
    return _batch_normalize_forward(x, scale, bias, epsilon)[0]


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


# Compiled as functions of their own, both are traced once for all layers of the same shape.
@partial(jax.jit, static_argnums=3)
def _batch_normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Residuals]:
    count = x.size // x.shape[-1]
    mean = channel_sum(x) / count
    var = channel_sum(jnp.square(x - mean)) / count
    inverse = lax.rsqrt(var + epsilon)
    return ((x - mean) * (scale * inverse) + bias, mean, var), (x, mean, inverse, scale)


@partial(jax.jit, static_argnums=0)
def _batch_normalize_backward(
    epsilon: float, residuals: Residuals, gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = residuals
    gradient = lax.optimization_barrier(gradients[0])  # what comes before is computed only once
    count = x.size // x.shape[-1]
    bias_gradient = channel_sum(gradient)
    scale_gradient = channel_sum(gradient * (x - mean)) * inverse
    slope = scale_gradient / count * inverse
    input_gradient = gradient - bias_gradient / count - (x - mean) * slope
    return input_gradient * (scale * inverse), scale_gradient, bias_gradient


batch_normalize.defvjp(_batch_normalize_forward, _batch_normalize_backward)
