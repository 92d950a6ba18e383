"""Each operation against PyTorch's, and what the CPU does against what the compiler would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from resnet_flax.operations import (
    broadcast_channels,
    channel_mean,
    max_pool,
)


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


def test_max_pool_differentiates_forward_too():
    images = jnp.asarray(random(1, 6, 6, 2))
    _, forward = jax.jvp(lambda x: max_pool(x, 3, 2, 1), (images,), (images,))
    np.testing.assert_allclose(forward, max_pool(images, 3, 2, 1), rtol=1e-6)


def test_channel_mean_keeps_float32s_digits():
    values = random(64, 48, 48, 8)
    exact = values.astype(np.float64).mean((0, 1, 2))
    error = np.abs(jax.jit(channel_mean)(values) - exact) / np.abs(exact)
    assert error.max() < 3e-7  # one running total has 2e-6


def test_gradient_of_a_broadcast_keeps_float32s_digits():
    cotangent = random(64, 48, 48, 8)
    zeros = jnp.zeros(8)
    out, pullback = jax.vjp(
        lambda v: broadcast_channels(v, cotangent) + jnp.zeros_like(cotangent), zeros
    )
    assert out.shape == cotangent.shape
    exact = cotangent.astype(np.float64).sum((0, 1, 2))
    (gradient,) = jax.jit(pullback)(cotangent)
    assert (np.abs(gradient - exact) / np.abs(exact)).max() < 5e-7


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (2, 3, 4, 3)])
def test_means_and_broadcasts_of_every_rank(shape):
    values = random(*shape)
    np.testing.assert_allclose(channel_mean(values), values.reshape(-1, 3).mean(0), rtol=1e-5)
    channels = jnp.arange(3.0)
    np.testing.assert_array_equal(broadcast_channels(channels, values) + values, channels + values)
