"""3x3 convolutions with half the multiplications or fewer, for CPUs (Lavin & Gray, 2015).

A tile of the output is a short product of polynomials, computed from its values at a few points:
``output = A [(G kernel G^T) * (B input B^T)] A^T`` (arXiv:1509.09308, eq. 8). Summed over channels,
the products at each point are one matrix product, so that the time goes into the CPU's quickest
operation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Points = dict[tuple[int, int], jax.Array]


class Tiling(NamedTuple):
    """The matrices of one algorithm, in one dimension.

    Attributes:
        side: pixels of an output tile; an input tile has two more.
        b: (points, side + 2), transforms the input.
        g: (points, 3), transforms the kernel.
        a: (side, points), transforms the products back.
    """

    side: int
    b: np.ndarray
    g: np.ndarray
    a: np.ndarray


# F(2, 3) of Lavin & Gray: 16 products for 4 pixels instead of 36.
TILES_OF_2 = Tiling(
    2,
    np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
)

# An image of side 3 between zeros, (0, p, q, r, 0), in 5 products instead of 7: with s = p + r,
# t = p - r and the kernel (k, l, m), the outputs' sum and the middle one are a symmetric function
# of s / sqrt(2) and q, diagonal in their sum and difference; the rest is three products of t and q.
_R = np.sqrt(0.5)
IMAGE_OF_3 = Tiling(
    3,
    np.array(
        [[0, _R, 1, _R, 0], [0, _R, -1, _R, 0], [0, 1, 0, -1, 0], [0, 0, 1, 0, 0], [0, 1, 0, -1, 0]]
    ),
    np.array([[_R / 2, 0.5, _R / 2], [-_R / 2, 0.5, -_R / 2], [0, 1, 0], [1, 0, -1], [1, 0, -1]]),
    np.array([[_R, _R, 0.5, -0.5, 0], [1, -1, 0, 0, 0.5], [_R, _R, -0.5, 0.5, 0]]),
)


# Images are transformed in parts of this size, so that a part's values, four times as many, stay in
# the cache until the matrix products read them; each part reads the kernel's again, so ...
PART_BYTES = 2_000_000
# ... it has at least this many tiles for each of its channels.
PART_TILES = 8


def choose_tiling(x: jax.Array) -> Tiling:
    """The cheaper algorithm for images (N, H, W, C)."""
    return IMAGE_OF_3 if x.shape[1:3] == (3, 3) else TILES_OF_2


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Cross-correlates (N, H, W, C) with (3, 3, C, features), one zero around the image."""
    return _convolve(x, kernel, "pc,cf->pf")


def input_gradient(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient of `convolve` with respect to its input, from that of its output."""
    return _convolve(gradient, kernel[::-1, ::-1], "pf,cf->pc")


def kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gradient of `convolve` with respect to its kernel, from its input and output gradient."""
    tiling, parts = choose_tiling(x), _parts(x)

    def add_part(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        inputs = _input_points(part[0], tiling)
        outputs = _gradient_points(part[1], tiling)
        products = [jnp.einsum("pc,pf->cf", inputs[point], outputs[point]) for point in inputs]
        return total + jnp.stack(products), None

    count = len(tiling.b)
    shape = count * count, x.shape[-1], gradient.shape[-1]
    start = lax.full_like(x, 0, shape=shape)  # and over the axes of a mesh it varies alike
    total, _ = lax.scan(add_part, start, (_split(x, parts), _split(gradient, parts)))
    taps = _transform(tiling.g.T, lambda i, j: total[i * count + j])
    return jnp.stack([taps[tap] for tap in sorted(taps)]).reshape(3, 3, *taps[0, 0].shape)


def _convolve(x: jax.Array, kernel: jax.Array, product: str) -> jax.Array:
    tiling, parts = choose_tiling(x), _parts(x)
    weights = _transform(tiling.g, lambda i, j: kernel[i, j])

    def convolve_part(x: jax.Array) -> jax.Array:
        samples, height, width, _ = x.shape
        rows, columns = _tiles(x, tiling)
        shape = (samples, rows, columns, -1)
        inputs = _input_points(x, tiling)
        products = {
            point: jnp.einsum(product, inputs[point], weights[point]).reshape(shape)
            for point in inputs
        }
        pixels = _transform(tiling.a, lambda i, j: products[i, j])
        side = range(tiling.side)
        lines = [jnp.stack([pixels[i, j] for j in side], 3) for i in side]
        y = jnp.stack(lines, 2).reshape(samples, rows * tiling.side, columns * tiling.side, -1)
        return y[:, :height, :width]

    y = lax.map(convolve_part, _split(x, parts))
    return y.reshape(len(x), *y.shape[2:])


def _parts(x: jax.Array) -> int:
    """Number of parts of the batch."""
    rows, columns = _tiles(x, choose_tiling(x))
    samples, channels = len(x), x.shape[-1]
    most = min(x.nbytes // PART_BYTES, samples * rows * columns // (PART_TILES * channels))
    return max(part for part in range(1, max(1, most) + 1) if samples % part == 0)


def _split(x: jax.Array, parts: int) -> jax.Array:
    return x.reshape(parts, -1, *x.shape[1:])


def _tiles(x: jax.Array, tiling: Tiling) -> tuple[int, int]:
    """Number of tiles along height and width, the last ones possibly beyond the image."""
    return -(-x.shape[1] // tiling.side), -(-x.shape[2] // tiling.side)


def _input_points(x: jax.Array, tiling: Tiling) -> Points:
    """Point -> (tiles of all images, C)."""
    side = tiling.side
    _, height, width, _ = x.shape
    rows, columns = _tiles(x, tiling)
    x = jnp.pad(x, ((0, 0), (1, rows * side - height + 1), (1, columns * side - width + 1), (0, 0)))
    last_row, last_column = side * (rows - 1) + 1, side * (columns - 1) + 1
    points = _transform(
        tiling.b, lambda i, j: x[:, i : i + last_row : side, j : j + last_column : side]
    )
    return {point: _matrix(values) for point, values in points.items()}


def _gradient_points(gradient: jax.Array, tiling: Tiling) -> Points:
    """Point -> (tiles of all images, features)."""
    side = tiling.side
    _, height, width, _ = gradient.shape
    rows, columns = _tiles(gradient, tiling)
    missing = ((0, rows * side - height), (0, columns * side - width))
    gradient = jnp.pad(gradient, ((0, 0), *missing, (0, 0)))
    points = _transform(tiling.a.T, lambda i, j: gradient[:, i::side, j::side])
    return {point: _matrix(values) for point, values in points.items()}


def _matrix(values: jax.Array) -> jax.Array:
    return values.reshape(-1, values.shape[-1])


def _transform(matrix: np.ndarray, part: Callable[[int, int], jax.Array]) -> Points:
    """``matrix @ parts @ matrix.T``, written as sums of the arrays that ``part`` returns."""
    count, size = matrix.shape
    found = {}
    for i in range(count):
        for j in range(count):
            factors = np.outer(matrix[i], matrix[j])
            terms = [
                part(row, column) * factors[row, column].item()
                for row in range(size)
                for column in range(size)
                if factors[row, column]
            ]
            found[i, j] = sum(terms[1:], terms[0])
    return found
