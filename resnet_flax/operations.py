"""The arithmetic beneath the layers, written so that a CPU is precise and quick too.

Every function gives the values of the plain JAX operation to float32 rounding. Where a CPU needs
another formulation, `jax.lax.platform_dependent` chooses when the program is compiled, so that GPUs
and TPUs keep the compiler's own.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def channel_mean(x: jax.Array) -> jax.Array:
    """Mean of (..., C) over all axes but the last, one axis after the other.

    On a CPU, XLA adds all values in one running total: over the 589,824 of a channel after D2L's
    first convolution, float32 loses a digit, and every ReLU that flips for it changes gradients by
    percents (benchmarks/precision.py). Short sums keep the digit; the barriers keep them apart.
    """
    while x.ndim > 1:
        x = lax.optimization_barrier(x.mean(-2))
    return x


def broadcast_channels(values: jax.Array, x: jax.Array) -> jax.Array:
    """Broadcasts (C,) over ``x``, (..., C), so that its gradient is summed as in `channel_mean`."""
    for size in x.shape[:-2]:
        values = lax.optimization_barrier(jnp.repeat(values[..., None, :], size, -2))
    return values[..., None, :]


def convolve(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> jax.Array:
    """Cross-correlates x, (N, H, W, C), with a kernel, (k, k, C, features)."""
    by_compiler = partial(
        lax.conv_general_dilated,
        window_strides=(strides, strides),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    by_columns = partial(convolve_by_columns, strides=strides, padding=padding)
    size = kernel.shape[0]
    smallest = min((side + 2 * padding - size) // strides + 1 for side in x.shape[1:3])
    if smallest >= size and x.dtype != jnp.float64:
        return by_compiler(x, kernel)
    # XLA has no fast convolution on a CPU for float64, nor for images smaller than the kernel: 3x3
    # on 2x2 pixels runs at 3 GFLOP/s, as a matrix product at 80.
    return lax.platform_dependent(x, kernel, cpu=by_columns, default=by_compiler)


def convolve_by_columns(
    x: jax.Array, kernel: jax.Array, *, strides: int, padding: int
) -> jax.Array:
    """The same as one matrix product of every window's pixels with the kernel."""
    size, _, channels, features = kernel.shape
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    rows, columns = (side - size + 1 for side in x.shape[1:3])
    windows = [
        x[:, row : row + rows : strides, column : column + columns : strides]
        for row in range(size)
        for column in range(size)
    ]
    return jnp.concatenate(windows, -1) @ kernel.reshape(size * size * channels, features)


def max_pool(x: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
    """Max pooling as ``torch.nn.MaxPool2d``: padding never wins, since it counts as -inf.

    Args:
        x: (N, H, W, C).
        window: side of the window, in pixels.
        strides: step of the window, in pixels.
        padding: pixels added on each of the four edges.

    Returns:
        (N, H', W', C) with H' = (H + 2 * padding - window) // strides + 1.
    """
    edges = [(padding, padding)] * 2
    by_compiler = partial(
        nn.max_pool, window_shape=(window, window), strides=(strides, strides), padding=edges
    )
    if (window, strides, padding) != (3, 2, 1):
        return by_compiler(x)
    return lax.platform_dependent(x, cpu=_max_pool_by_planes, default=by_compiler)


def _max_pool_by_planes(x: jax.Array) -> jax.Array:
    """The stem's 3x3 pooling with a gradient of selections and shifts.

    XLA's gradient of a pooling scatters pixel by pixel, which takes a CPU an eighth of a training
    step of D2L's network; here the pixels of even and odd rows and columns are four planes, in
    which each of the window's nine places is a shifted view. As in PyTorch, the first of several
    equal pixels gets the gradient.
    """
    samples, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    edges = [(0, 0), (1, 2 * rows + 1 - height), (1, 2 * columns + 1 - width), (0, 0)]
    x = jnp.pad(x, edges, constant_values=-jnp.inf)
    planes = x.reshape(samples, rows + 1, 2, columns + 1, 2, channels)
    places = [
        planes[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]
        for i in range(3)
        for j in range(3)
    ]
    values = [lax.stop_gradient(place) for place in places]
    largest = functools.reduce(jnp.maximum, values)
    winner = jnp.full(largest.shape, len(places), jnp.uint8)
    for index in reversed(range(len(places))):
        winner = jnp.where(values[index] == largest, jnp.uint8(index), winner)
    winner = lax.optimization_barrier(winner)  # found once, not again for each place's gradient
    for index, place in enumerate(places):
        largest = jnp.where(winner == index, place, largest)  # no winner: a NaN stays
    return largest
