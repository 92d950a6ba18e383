"""Max pooling, with a gradient that is quick, and average pooling."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resnet_flax.nn.ops.derivatives import Arrays, linear
from resnet_flax.nn.ops.normalization import at_least_float32
from resnet_flax.nn.ops.platform import barrier_on_cpu, choose


def max_pool(
    x: Float[Array, "N H W C"], window: int, strides: int, padding: int
) -> Float[Array, "N H2 W2 C"]:
    """Max pooling as ``torch.nn.MaxPool2d``: padding never wins, since it counts as -inf.

    Args:
        x: (N, H, W, C).
        window: side of the window, in pixels.
        strides: step of the window, in pixels.
        padding: pixels added on each of the four edges.

    Returns:
        (N, H', W', C) with H' = (H + 2 * padding - window) // strides + 1.
    """
    if (window, strides, padding) == (3, 2, 1):
        return _max_pool_of_the_stem(x, -jnp.inf)
    edges = [(padding, padding)] * 2
    return nn.max_pool(x, (window, window), strides=(strides, strides), padding=edges)


def max_pool_rectified(x: Float[Array, "N H W C"]) -> Float[Array, "N H2 W2 C"]:
    """The stem's ReLU and 3x3 max pooling; on an accelerator a maximum that starts from zero."""

    def one_by_one(x: jax.Array) -> jax.Array:
        return max_pool(nn.relu(x), 3, 2, 1)

    return choose(x, cpu=one_by_one, accelerator=partial(_max_pool_of_the_stem, floor=0.0))


def average_pool(x: Float[Array, "N H W C"], window: int) -> Float[Array, "N H2 W2 C"]:
    """Means over squares of so many pixels, side by side, of which the last may be cut off.

    It is ``torch.nn.AvgPool2d(window, ceil_mode=True, count_include_pad=False)``: a mean is that of
    the pixels there are. Sums are float32 at least.

    Args:
        x: (N, H, W, C).
        window: side of the square, and its step.

    Returns:
        (N, ceil(H / window), ceil(W / window), C).
    """
    samples, *sides, channels = x.shape
    rows, columns = counts = [-(-side // window) for side in sides]
    edges = [(0, count * window - side) for count, side in zip(counts, sides, strict=True)]
    padded = jnp.pad(x, [(0, 0), *edges, (0, 0)])
    squares = padded.reshape(samples, rows, window, columns, window, channels)
    sums = squares.sum((2, 4), dtype=at_least_float32(x.dtype))
    tall, wide = (
        np.minimum(window, side - window * np.arange(count))
        for count, side in zip(counts, sides, strict=True)
    )
    return (sums / (tall[:, None] * wide)[None, ..., None].astype(sums.dtype)).astype(x.dtype)


PLACES = [(row, column) for row in range(3) for column in range(3)]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool_of_the_stem(x: jax.Array, floor: float) -> jax.Array:
    """The stem's 3x3 pooling with a gradient of selections and shifts.

    XLA's gradient of a pooling scatters pixel by pixel, which took a CPU an eighth of a training
    step of D2L's network, and a GPU a twelfth; here the pixels of even and odd rows and columns are
    four planes, in which each of the window's nine places is a shifted view. As in PyTorch, the
    first of several equal pixels gets the gradient.
    """
    return _max_pool_forward(x, floor)[0]


@_max_pool_of_the_stem.defjvp
def _max_pool_differentiate(
    floor: float, inputs: Arrays, tangents: Arrays
) -> tuple[jax.Array, jax.Array]:
    largest, winner = _max_pool_forward(*inputs, floor)
    _, height, width, _ = inputs[0].shape
    backward = partial(_max_pool_backward, height, width)
    return largest, linear(_max_pool_tangent, backward, (winner,), tangents)


def _places(x: jax.Array, padding: float) -> Iterator[jax.Array]:
    """(N, H, W, C) as each of a window's nine places sees it, (N, H', W', C)."""
    samples, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    edges = [(0, 0), (1, 2 * rows + 1 - height), (1, 2 * columns + 1 - width), (0, 0)]
    padded = barrier_on_cpu(jnp.pad(x, edges, constant_values=padding))
    planes = padded.reshape(samples, rows + 1, 2, columns + 1, 2, channels)
    for i, j in PLACES:
        yield planes[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]


# Within one program, `jax_debug_infs` does not meet the padding.
@partial(jax.jit, static_argnums=1)
def _max_pool_forward(x: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
    samples, height, width, channels = x.shape
    largest = jnp.full((samples, (height + 1) // 2, (width + 1) // 2, channels), floor, x.dtype)
    winner = jnp.full(largest.shape, 0 if floor < 0 else len(PLACES), jnp.uint8)
    for index, place in enumerate(_places(x, -jnp.inf)):
        wins = ~(place <= largest)  # so that a NaN wins ...
        wins &= largest == largest  # ... and stays
        largest = jnp.where(wins, place, largest)
        winner = jnp.where(wins, jnp.uint8(index), winner)
    return barrier_on_cpu((largest, winner))


def _max_pool_tangent(residuals: Arrays, tangents: Arrays) -> jax.Array:
    (winner,), (tangent,) = residuals, tangents
    total = jnp.zeros((), tangent.dtype)
    for index, place in enumerate(_places(tangent, 0)):
        total += jnp.where(winner == jnp.uint8(index), place, 0)
    return total


def _max_pool_backward(
    height: int, width: int, residuals: Arrays, gradient: jax.Array
) -> tuple[jax.Array]:
    spread, gather = (
        partial(function, height=height, width=width)
        for function in (_spread_by_planes, _gather_by_pixels)
    )
    return (choose(gradient, *residuals, cpu=spread, accelerator=gather),)


def _gather_by_pixels(
    gradient: jax.Array, winner: jax.Array, *, height: int, width: int
) -> jax.Array:
    """Each pixel asks the up to four windows that hold it: one kernel, and no scattering."""

    def twice(values: jax.Array) -> jax.Array:
        """(N, H', W', C) to (N, H, W, C), each value for two rows and columns."""
        return jnp.repeat(jnp.repeat(values, 2, 1), 2, 2)[:, :height, :width]

    rows, columns = np.ogrid[:height, :width]
    total = jnp.zeros((), gradient.dtype)
    for i, j in [(0, 0), (0, 1), (1, 0), (1, 1)]:  # the window of the pixel's block, and the next
        edges = [(0, 0), (0, i), (0, j), (0, 0)]
        next_gradient = jnp.pad(gradient, edges)[:, i:, j:]
        next_winner = jnp.pad(winner, edges, constant_values=len(PLACES))[:, i:, j:]
        row, column = rows % 2 + 1 - 2 * i, columns % 2 + 1 - 2 * j
        place = np.where((row >= 0) & (column >= 0), 3 * row + column, -1)[None, :, :, None]
        wins = twice(next_winner).astype(jnp.int32) == place.astype(np.int32)
        total += jnp.where(wins, twice(next_gradient), 0)
    return total


def _spread_by_planes(
    gradient: jax.Array, winner: jax.Array, *, height: int, width: int
) -> jax.Array:
    samples, rows, columns, channels = gradient.shape
    edges = [(0, 0), (1, 1), (1, 1), (0, 0)]
    gradient, winner = lax.optimization_barrier(
        (jnp.pad(gradient, edges), jnp.pad(winner, edges, constant_values=len(PLACES)))
    )

    def plane(row: int, column: int) -> jax.Array:
        """Gradient of the padded input's rows and columns of one parity."""
        total = jnp.zeros((), gradient.dtype)
        for index, (i, j) in enumerate(PLACES):
            if (i % 2, j % 2) == (row, column):
                top, left = 1 - i // 2, 1 - j // 2
                window = np.s_[:, top : top + rows + 1, left : left + columns + 1]
                total += jnp.where(winner[window] == index, gradient[window], 0)
        return total

    lines = [jnp.stack([plane(row, column) for column in (0, 1)], 3) for row in (0, 1)]
    padded = jnp.stack(lines, 2).reshape(samples, 2 * (rows + 1), 2 * (columns + 1), channels)
    return padded[:, 1 : height + 1, 1 : width + 1]
