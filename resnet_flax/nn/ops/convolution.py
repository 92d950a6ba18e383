"""The convolution, with gradients and formulations of its own where they are quicker.

Every path gives the values of `jax.lax.conv_general_dilated` to rounding. Which one is taken is
decided when the program is compiled, by platform and shape; groups and dilation are the compiler's
own, but for a kernel's gradient on a CPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import resnet_flax.nn.ops.winograd as winograd
from resnet_flax.nn.ops.derivatives import Arrays, linear, vary_alike
from resnet_flax.nn.ops.platform import choose

# Winograd's transforms pay when each value they make is used often enough: that of a pixel by this
# many channels, and that of the kernel by this many pixels for each of its channels.
WINOGRAD_CHANNELS = 64
WINOGRAD_PIXELS = 4


def convolve(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "k k inputs features"],
    strides: int,
    padding: int,
    dilation: int = 1,
) -> Float[Array, "N H2 W2 features"]:
    """Cross-correlates images with a square kernel.

    Args:
        x: (N, H, W, C).
        kernel: (k, k, C / groups, features), of the same dtype; its shape tells the groups.
        strides: step of the kernel, in pixels, along both axes.
        padding: zeros added on each of the four edges, in pixels.
        dilation: distance of the kernel's pixels, along both axes.

    Returns:
        (N, H', W', features), H' = (H + 2 * padding - dilation * (k - 1) - 1) // strides + 1.
    """
    x, kernel = vary_alike(x, kernel)
    return _convolve(x, kernel, strides, padding, dilation)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, kernel: jax.Array, strides: int, padding: int, dilation: int
) -> jax.Array:
    return _forward(x, kernel, strides, padding, dilation)


@_convolve.defjvp
def _differentiate(
    strides: int, padding: int, dilation: int, inputs: Arrays, tangents: Arrays
) -> tuple[jax.Array, jax.Array]:
    steps = strides, padding, dilation
    tangent = linear(partial(_tangent, *steps), partial(_backward, *steps), inputs, tangents)
    return _forward(*inputs, *steps), tangent


# Compiled as functions of their own, each is traced once for all layers of the same shape.
@partial(jax.jit, static_argnums=(2, 3, 4))
def _forward(
    x: jax.Array, kernel: jax.Array, strides: int, padding: int, dilation: int
) -> jax.Array:
    if _is_special(x, kernel, dilation):
        return _by_compiler(x, kernel, strides=strides, padding=padding, dilation=dilation)
    on_cpu = partial(_convolve_on_cpu, strides=strides, padding=padding)
    on_accelerator = partial(_convolve_on_accelerator, strides=strides, padding=padding)
    return choose(x, kernel, cpu=on_cpu, accelerator=on_accelerator)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _tangent(
    strides: int, padding: int, dilation: int, inputs: Arrays, tangents: Arrays
) -> jax.Array:
    steps = strides, padding, dilation
    (x, kernel), (x_tangent, kernel_tangent) = inputs, tangents
    return _forward(x_tangent, kernel, *steps) + _forward(x, kernel_tangent, *steps)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(
    strides: int, padding: int, dilation: int, inputs: Arrays, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    if _is_special(x, kernel, dilation):
        options: dict[str, Any] = {"strides": strides, "padding": padding, "dilation": dilation}
        by_taps = partial(_special_gradients, to_kernel=_by_taps, **options)
        by_compiler = partial(_special_gradients, to_kernel=_by_compiler, **options)
        return choose(*inputs, gradient, cpu=by_taps, accelerator=by_compiler)
    on_cpu = partial(_gradients_on_cpu, strides=strides, padding=padding)
    on_accelerator = partial(_gradients_on_accelerator, strides=strides, padding=padding)
    return choose(*inputs, gradient, cpu=on_cpu, accelerator=on_accelerator)


def _by_compiler(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int,
    padding: int,
    dilation: int = 1,
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=[(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def _is_special(x: jax.Array, kernel: jax.Array, dilation: int) -> bool:
    return dilation > 1 or x.shape[-1] != kernel.shape[2]


def _special_gradients(
    x: jax.Array,
    kernel: jax.Array,
    gradient: jax.Array,
    *,
    to_kernel: Callable[..., jax.Array],
    **options: int,
) -> tuple[jax.Array, jax.Array]:
    (input_gradient,) = jax.vjp(lambda x: _by_compiler(x, kernel, **options), x)[1](gradient)
    (kernel_gradient,) = jax.vjp(lambda k: to_kernel(x, k, **options), kernel)[1](gradient)
    return input_gradient, kernel_gradient


def _by_taps(
    x: jax.Array, kernel: jax.Array, *, strides: int, padding: int, dilation: int
) -> jax.Array:
    """Each of the kernel's pixels by itself: a matrix product for each group.

    XLA has no fast gradient of a grouped kernel on a CPU: that of 3x3x8x256 on 4 images of 28x28
    took 3.2 s, and takes 0.05 s so.
    """
    size, inputs, features = kernel.shape[1:]
    groups, reach = x.shape[-1] // inputs, dilation * (size - 1) + 1
    outputs = [(side + 2 * padding - reach) // strides + 1 for side in x.shape[1:3]]
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    height, width = ((count - 1) * strides + 1 for count in outputs)
    y = jnp.zeros((), x.dtype)
    for row, column in np.ndindex(size, size):
        top, left = row * dilation, column * dilation
        window = x[:, top : top + height : strides, left : left + width : strides]
        window = window.reshape(*window.shape[:3], groups, inputs)
        tap = kernel[row, column].reshape(inputs, groups, features // groups)
        y += jnp.einsum("nhwgi,igo->nhwgo", window, tap)
    return y.reshape(*y.shape[:3], features)


def _convolve_on_accelerator(
    x: jax.Array, kernel: jax.Array, *, strides: int, padding: int
) -> jax.Array:
    if (kernel.shape[0], strides, padding) == (7, 2, 3):
        return _by_blocks(x, kernel)
    if (kernel.shape[0], padding) == (1, 0):
        if strides > 1:  # fused into the product, XLA's GPU compiler of jax 0.11 ends the process
            x = lax.optimization_barrier(x[:, ::strides, ::strides])
        return x @ kernel[0, 0]
    return _by_compiler(x, kernel, strides=strides, padding=padding)


def _by_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The stem's 7x7 convolution of stride 2 as one of stride 1 on blocks of pixels.

    A block has two rows and makes up to four neighbours of an output row, so that the matrix units
    get more channels than an image has, and the outputs lie in memory as they should.
    """
    samples, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    outputs = next(count for count in (4, 2, 1) if columns % count == 0)
    side = 2 * outputs  # columns of a block
    across = -(-(side + 5) // side)  # blocks that a window of the outputs' pixels meets
    edges = [(3, 2 * rows + 3 - height), (3, side * (columns // outputs + across - 1) - width - 3)]
    x = jnp.pad(x, [(0, 0), *edges, (0, 0)])
    x = x.reshape(samples, rows + 3, 2, columns // outputs + across - 1, side, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:2], x.shape[3], 2 * side * channels)
    shifted = [
        jnp.pad(kernel, [(0, 1), (2 * i, across * side - 7 - 2 * i), (0, 0), (0, 0)])
        for i in range(outputs)
    ]
    kernel = jnp.stack(shifted, 3).reshape(4, 2, across, side, channels, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, across, 2 * side * channels, -1)
    y = _by_compiler(x, kernel, strides=1, padding=0)
    return y.reshape(samples, rows, columns, y.shape[3] // outputs)


def _gradients_on_accelerator(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, *, strides: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    convolution = partial(_convolve_on_accelerator, strides=strides, padding=padding)
    return jax.vjp(convolution, x, kernel)[1](gradient)


def _convolve_on_cpu(x: jax.Array, kernel: jax.Array, *, strides: int, padding: int) -> jax.Array:
    if _winograd_pays(x, kernel, strides, padding):
        return winograd.convolve(x, kernel)
    if _compiler_is_slow(x, kernel, strides, padding):
        return _by_columns(x, kernel, strides=strides, padding=padding)
    return _by_compiler(x, kernel, strides=strides, padding=padding)


def _gradients_on_cpu(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, *, strides: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    # XLA transposes both for the kernel's gradient; fused into what computes them, that copy ran
    # ten times as long, a quarter of a training step.
    x, gradient = lax.optimization_barrier((x, gradient))
    if _winograd_pays(x, kernel, strides, padding):
        input_gradient = winograd.input_gradient(gradient, kernel)
        # One after the other: side by side they would push each other's parts out of the cache.
        x, gradient, input_gradient = lax.optimization_barrier((x, gradient, input_gradient))
        return input_gradient, winograd.kernel_gradient(x, gradient)
    slow = _compiler_is_slow(x, kernel, strides, padding)
    by_columns = partial(_by_columns, strides=strides, padding=padding)
    by_compiler = partial(_by_compiler, strides=strides, padding=padding)
    # XLA spreads a strided convolution's gradient with zeros, and multiplies by them.
    to_input = by_columns if slow or strides > 1 else by_compiler
    to_kernel = by_columns if slow else by_compiler
    (input_gradient,) = jax.vjp(lambda x: to_input(x, kernel), x)[1](gradient)
    (kernel_gradient,) = jax.vjp(lambda kernel: to_kernel(x, kernel), kernel)[1](gradient)
    return input_gradient, kernel_gradient


def _winograd_pays(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> bool:
    same = (kernel.shape[0], strides, padding) == (3, 1, 1)
    samples, height, width, _ = x.shape
    if not isinstance(samples, int):  # an exported program takes any number of images
        return False
    pixels = samples * height * width if min(height, width) > 1 else 0
    enough = WINOGRAD_PIXELS * max(kernel.shape[2:]) <= pixels
    return same and enough and min(kernel.shape[2:]) >= WINOGRAD_CHANNELS


def _compiler_is_slow(x: jax.Array, kernel: jax.Array, strides: int, padding: int) -> bool:
    """XLA has no fast convolution on a CPU for float64, nor for images smaller than the kernel.

    3x3 on 2x2 pixels runs at 3 GFLOP/s, as a matrix product at 80.
    """
    size = kernel.shape[0]
    smallest = min((side + 2 * padding - size) // strides + 1 for side in x.shape[1:3])
    return smallest < size or x.dtype == jnp.float64


def _by_columns(x: jax.Array, kernel: jax.Array, *, strides: int, padding: int) -> jax.Array:
    """One matrix product of every window's pixels with the kernel."""
    size, features = kernel.shape[0], kernel.shape[-1]
    rows, columns = (_useful_taps(side, size, strides, padding) for side in x.shape[1:3])
    outputs = [(side + 2 * padding - size) // strides + 1 for side in x.shape[1:3]]
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    height, width = ((count - 1) * strides + 1 for count in outputs)
    windows = [
        x[:, row : row + height : strides, column : column + width : strides]
        for row in rows
        for column in columns
    ]
    kernel = kernel[rows.start : rows.stop, columns.start : columns.stop]
    return jnp.concatenate(windows, -1) @ kernel.reshape(-1, features)


def _useful_taps(side: int, size: int, strides: int, padding: int) -> range:
    """Those rows of the kernel that meet a pixel at all: of 3, one where the image has one."""
    last = (side + 2 * padding - size) // strides * strides
    taps = [
        tap
        for tap in range(size)
        if any(0 <= start + tap - padding < side for start in range(0, last + 1, strides))
    ]
    return range(taps[0], taps[-1] + 1)
