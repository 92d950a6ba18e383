"""Each operation against PyTorch's, and what the CPU does against what the compiler would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from resnet_flax.nn.ops.normalization import add_bias, batch_normalize, channel_sum
from resnet_flax.nn.ops.pooling import average_pool, max_pool


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1, shape).astype(np.float32)


def to_torch(x: np.ndarray, axes: tuple[int, ...] = (0, 3, 1, 2)) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(axes))).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 9, 7, 3), (1, 1, 1, 2), (1, 2, 3, 2)])
@pytest.mark.parametrize("levels", [None, 2])
def test_max_pool_and_its_gradient_are_pytorchs(shape, levels):
    images = random(*shape)
    if levels:  # ties everywhere, as in an image's background
        images = np.round(images * levels / 4)
    ours, pullback = jax.vjp(lambda x: max_pool(x, 3, 2, 1), jnp.asarray(images))
    cotangent = random(*ours.shape, seed=1)

    x = to_torch(images)
    theirs = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    theirs.backward(to_torch(cotangent))
    np.testing.assert_array_equal(ours, theirs.detach().permute(0, 2, 3, 1))
    (gradient,) = pullback(jnp.asarray(cotangent))
    np.testing.assert_allclose(gradient, x.grad.permute(0, 2, 3, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("window", "strides", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 1)])
def test_max_pool_ignores_its_padding(window, strides, padding):
    images = -1 - np.abs(random(2, 9, 9, 3))  # zeros at the edges would win
    theirs = torch.nn.functional.max_pool2d(to_torch(images), window, strides, padding)
    ours = max_pool(jnp.asarray(images), window, strides, padding)
    np.testing.assert_array_equal(ours, theirs.detach().permute(0, 2, 3, 1))


@pytest.mark.parametrize("place", range(9))
def test_max_pool_keeps_a_nan(place):
    images = np.zeros((1, 3, 3, 1), np.float32)
    images.flat[place] = np.nan
    pooled = max_pool(jnp.asarray(images), 3, 2, 1)
    expected = nn.max_pool(images, (3, 3), strides=(2, 2), padding=[(1, 1)] * 2)
    np.testing.assert_array_equal(pooled, expected)
    assert np.isnan(pooled).any()


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 9, 7, 3), (1, 1, 1, 2), (1, 1, 4, 2)])
@pytest.mark.parametrize("window", [2, 3])
def test_average_pool_and_its_gradient_are_pytorchs(shape, window):
    images = random(*shape)
    ours, pullback = jax.vjp(lambda x: average_pool(x, window), jnp.asarray(images))
    cotangent = random(*ours.shape, seed=1)

    x = to_torch(images)
    theirs = torch.nn.AvgPool2d(window, ceil_mode=True, count_include_pad=False)(x)
    theirs.backward(to_torch(cotangent))
    np.testing.assert_allclose(ours, theirs.detach().permute(0, 2, 3, 1), rtol=1e-6, atol=1e-7)
    (gradient,) = pullback(jnp.asarray(cotangent))
    np.testing.assert_allclose(gradient, x.grad.permute(0, 2, 3, 1), rtol=1e-6, atol=1e-7)


def test_average_pool_adds_in_float32():
    images = jnp.asarray(random(1, 4, 4, 2), jnp.bfloat16)
    exact = average_pool(images.astype(jnp.float32), 2)
    pooled = average_pool(images, 2)
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooled, exact.astype(jnp.bfloat16))


def test_channel_sum_keeps_float32s_digits():
    values = random(64, 48, 48, 8)
    exact = values.astype(np.float64).sum((0, 1, 2))
    error = np.abs(jax.jit(channel_sum)(values) - exact) / np.abs(exact)
    assert error.max() < 3e-7  # one running total has 2e-6


@pytest.mark.parametrize(
    "shape", [(3,), (5, 3), (64, 3), (67, 3), (2, 4, 3), (2, 35, 4, 3), (1, 1, 1, 3), (0, 3)]
)
def test_channel_sum_of_every_rank_and_size(shape):
    values = random(*shape)
    np.testing.assert_allclose(channel_sum(values), values.reshape(-1, 3).sum(0), rtol=1e-5)


def test_gradient_of_a_bias_keeps_float32s_digits():
    cotangent = random(64, 48, 48, 8)
    y, pullback = jax.vjp(add_bias, jnp.zeros_like(cotangent), jnp.arange(8.0))
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(8), y.shape))
    exact = cotangent.astype(np.float64).sum((0, 1, 2))
    to_input, to_bias = jax.jit(pullback)(cotangent)
    np.testing.assert_array_equal(to_input, cotangent)
    assert (np.abs(to_bias - exact) / np.abs(exact)).max() < 5e-7


def test_a_bias_takes_the_dtype_of_what_it_is_added_to():
    cotangent = jnp.full((300, 1), 1, jnp.bfloat16)
    y, pullback = jax.vjp(add_bias, cotangent, jnp.float32([0.5]))
    assert y.dtype == jnp.bfloat16
    to_input, to_bias = pullback(cotangent)
    assert (to_input.dtype, to_bias.dtype) == (jnp.bfloat16, jnp.float32)
    assert to_bias == 300  # bfloat16 counts to 256


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 7, 3), (2, 1, 1, 3)])
def test_batch_normalize_and_its_gradients_are_pytorchs(shape):
    x, scale, bias = random(*shape), random(3, seed=1), random(3, seed=2)
    cotangent = random(*shape, seed=3)
    (y, mean, var), pullback = jax.vjp(lambda *args: batch_normalize(*args, 1e-5), x, scale, bias)
    gradients = pullback((cotangent, jnp.ones(3), jnp.ones(3)))  # the statistics give none

    inputs = [torch.from_numpy(array).requires_grad_() for array in (x.reshape(-1, 3), scale, bias)]
    normalize = torch.nn.functional.batch_norm
    theirs = normalize(inputs[0], None, None, *inputs[1:], training=True, eps=1e-5)
    theirs.backward(torch.from_numpy(cotangent.reshape(-1, 3)))
    np.testing.assert_allclose(y.reshape(-1, 3), theirs.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, x.reshape(-1, 3).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, x.reshape(-1, 3).var(0), rtol=1e-5)
    for gradient, tensor in zip(gradients, inputs, strict=True):
        shape = tensor.grad.shape
        np.testing.assert_allclose(gradient.reshape(shape), tensor.grad, rtol=1e-3, atol=1e-3)
