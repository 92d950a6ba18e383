"""The convolution and its gradients against PyTorch's, on every path a CPU takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from resnet_flax.nn.ops import convolution
from resnet_flax.nn.ops.convolution import convolve


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1, shape)


def to_torch(x: np.ndarray, axes: tuple[int, ...] = (0, 3, 1, 2)) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(axes))).requires_grad_()


def check(size, kernel, strides, padding, dtype, channels=(3, 4), samples=2, dilation=1, groups=1):
    """Output and both gradients, relative to the largest value."""
    height, width = size
    images = random(samples, height, width, channels[0] * groups).astype(dtype)
    weight = random(kernel, kernel, *channels, seed=1).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        steps = strides, padding, dilation
        reach = dilation * (kernel - 1)
        sides = ((side + 2 * padding - reach - 1) // strides + 1 for side in size)
        cotangent = random(samples, *sides, channels[1], seed=2).astype(dtype)

        @jax.jit
        def with_gradients(x, w, cotangent):
            y, pull = jax.vjp(lambda x, w: convolve(x, w, *steps), x, w)
            return y, *pull(cotangent)

        ours, image_gradient, weight_gradient = with_gradients(images, weight, cotangent)
    x, w = to_torch(images), to_torch(weight, (3, 2, 0, 1))
    theirs = torch.nn.functional.conv2d(x, w, None, *steps, groups)
    theirs.backward(to_torch(cotangent))
    tolerance = {"float32": 2e-6, "float64": 1e-13}[dtype]
    for found, expected in [
        (ours, theirs.detach().permute(0, 2, 3, 1)),
        (image_gradient, x.grad.permute(0, 2, 3, 1)),
        (weight_gradient, w.grad.permute(2, 3, 1, 0)),
    ]:
        assert found.dtype == dtype
        largest = float(expected.abs().max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 3), (4, 4), (9, 8)])
@pytest.mark.parametrize(
    ("kernel", "strides", "padding"), [(7, 2, 3), (3, 2, 1), (3, 1, 1), (1, 2, 0), (1, 1, 0)]
)
def test_convolution_and_its_gradients_are_pytorchs(size, kernel, strides, padding, dtype):
    check(size, kernel, strides, padding, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("dilation", "groups", "strides"), [(2, 1, 1), (1, 2, 2), (3, 4, 2)])
def test_dilation_groups_and_their_gradients_are_pytorchs(dilation, groups, strides, dtype):
    check((9, 8), 3, strides, dilation, dtype, (3, 8), dilation=dilation, groups=groups)


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (3, 4), (6, 6), (7, 7), (9, 2)])
def test_winograds_convolution_and_its_gradients_are_pytorchs(size, dtype, winograd_everywhere):
    assert convolution._winograd_pays(jnp.ones((2, *size, 3)), jnp.ones((3, 3, 3, 4)), 1, 1)
    check(size, 3, 1, 1, dtype)


@pytest.mark.parametrize("size", [6, 3, 24])
def test_winograd_is_as_precise_as_pytorch(size):
    images, weight = random(64, size, size, 128) - 0.3, random(3, 3, 128, 128, seed=1) - 0.3

    def theirs(dtype):
        x, w = to_torch(images.astype(dtype)), to_torch(weight.astype(dtype), (3, 2, 0, 1))
        return torch.nn.functional.conv2d(x, w, padding=1).detach().permute(0, 2, 3, 1).numpy()

    exact = theirs("float64")
    assert convolution._winograd_pays(images, weight, 1, 1)
    ours = jax.jit(lambda x, w: convolve(x, w, 1, 1))(*map(jnp.float32, (images, weight)))
    error, rivals = (
        np.linalg.norm(value - exact) / np.linalg.norm(exact) for value in (ours, theirs("float32"))
    )
    assert error < 1.5 * rivals
    assert error < 5e-7  # 3.8e-7 measured: four roundings of float32


@pytest.mark.parametrize(
    ("size", "channels", "platform", "by_compiler"),
    [
        (2, 4, "cpu", 0),
        (2, 4, "cuda", 1),
        (3, 4, "cpu", 1),
        (16, 128, "cpu", 0),
        (16, 128, "cuda", 1),
    ],
)
def test_only_a_cpu_takes_another_path(size, channels, platform, by_compiler):
    images, kernel = jnp.ones((2, size, size, channels)), jnp.ones((3, 3, channels, channels))
    function = jax.jit(lambda x, w: convolve(x, w, 1, 1))
    lowered = function.trace(images, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count("stablehlo.convolution") == by_compiler


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("inputs", "dilation", "words"),
    [(128, 2, "rhs_dilate = [2, 2]"), (32, 1, "feature_group_count = 4")],
)
def test_groups_and_dilation_are_the_compilers(inputs, dilation, words, platform):
    images, kernel = jnp.ones((2, 16, 16, 128)), jnp.ones((3, 3, inputs, 128))
    function = jax.jit(lambda x, w: convolve(x, w, 1, dilation, dilation))
    lowered = function.trace(images, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count("stablehlo.convolution") == 1
    assert words in lowered


def test_second_derivatives():
    images, weight = jnp.asarray(random(1, 4, 4, 2), "float32"), jnp.ones((3, 3, 2, 2))

    def loss(x):
        return (convolve(x, weight, 1, 1) ** 3).sum()

    _, product = jax.jvp(jax.grad(loss), (images,), (images,))
    # Euler's theorem: the gradient is homogeneous of degree 2.
    np.testing.assert_allclose(product, 2 * jax.grad(loss)(images), rtol=1e-4)
