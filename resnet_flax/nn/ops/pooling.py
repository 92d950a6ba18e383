"""Max pooling, with a gradient that is quick on a CPU too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float


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
    edges = [(padding, padding)] * 2
    by_compiler = partial(
        nn.max_pool, window_shape=(window, window), strides=(strides, strides), padding=edges
    )
    if (window, strides, padding) != (3, 2, 1):
        return by_compiler(x)
    return lax.platform_dependent(x, cpu=_max_pool_by_planes, default=by_compiler)


PLACES = [(row, column) for row in range(3) for column in range(3)]


@jax.custom_vjp
def _max_pool_by_planes(x: jax.Array) -> jax.Array:
    """The stem's 3x3 pooling with a gradient of selections and shifts.

    XLA's gradient of a pooling scatters pixel by pixel, which took a CPU an eighth of a training
    step of D2L's network; here the pixels of even and odd rows and columns are four planes, in
    which each of the window's nine places is a shifted view. As in PyTorch, the first of several
    equal pixels gets the gradient.
    """
    return _max_pool_forward(x)[0]


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    samples, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    edges = [(0, 0), (1, 2 * rows + 1 - height), (1, 2 * columns + 1 - width), (0, 0)]
    padded = jnp.pad(x, edges, constant_values=-jnp.inf)
    padded = lax.optimization_barrier(padded)
    planes = padded.reshape(samples, rows + 1, 2, columns + 1, 2, channels)
    largest = jnp.full((samples, rows, columns, channels), -jnp.inf, x.dtype)
    winner = jnp.zeros(largest.shape, jnp.uint8)
    for index, (i, j) in enumerate(PLACES):
        place = planes[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]
        wins = ~(place <= largest)  # so that a NaN wins ...
        wins &= largest == largest  # ... and stays
        largest = jnp.where(wins, place, largest)
        winner = jnp.where(wins, jnp.uint8(index), winner)
    largest, winner = lax.optimization_barrier((largest, winner))
    # An empty array carries the input's shape.
    return largest, (winner, jnp.zeros((height, width, 0)))


def _max_pool_backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array]:
    winner, like = residuals
    height, width, _ = like.shape
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
    return (padded[:, 1 : height + 1, 1 : width + 1],)


_max_pool_by_planes.defvjp(_max_pool_forward, _max_pool_backward)
