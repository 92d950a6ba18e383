"""What an accelerator computes, on a CPU: each operation against plain JAX in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_flax.nn.blocks import Residual
from resnet_flax.nn.layers import BatchNorm
from resnet_flax.nn.ops.convolution import _by_compiler, convolve
from resnet_flax.nn.ops.normalization import add_bias, batch_normalize, channel_sum, channel_sums
from resnet_flax.nn.ops.platform import choose, traced_for
from resnet_flax.nn.ops.pooling import max_pool, max_pool_rectified


class Halves(nn.Module):
    """Some other normalisation, which leaves a bias's effect."""

    scale_init: object = None

    @nn.compact
    def __call__(self, x, train=False):
        return x / 2


@pytest.fixture(autouse=True)
def accelerator():
    with traced_for("gpu"), jax.enable_x64(True):
        yield


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 1, shape))


def check(ours, plain, *arguments, tolerance=1e-12):
    """Values and gradients, relative to the largest."""
    cotangent = random(*jax.eval_shape(plain, *arguments).shape, seed=9)

    def with_gradients(function):
        value, pull = jax.vjp(function, *arguments)
        return value, *pull(cotangent)

    @jax.jit
    def both():
        return with_gradients(ours), with_gradients(plain)

    for a, b in zip(*both(), strict=True):
        assert a.dtype == b.dtype
        largest = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(largest, 1e-300))


def test_what_is_traced_inside_is_for_one_platform():
    @jax.jit
    def which(x):
        return choose(x, cpu=lambda x: x, accelerator=lambda x: -x)

    for platform, expected in ((None, 1), ("cpu", 1), ("gpu", -1), ("tpu", -1), (None, 1)):
        with traced_for(platform):
            assert which(1) == expected


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (9, 7), (8, 16), (33, 34), (12, 20)])
@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "channels"),
    [
        (7, 2, 3, 1),
        (7, 2, 3, 3),
        (3, 2, 1, 3),
        (3, 1, 1, 1),
        (3, 1, 1, 3),
        (1, 2, 0, 3),
        (1, 1, 0, 3),
    ],
)
def test_convolution(kernel, strides, padding, channels, size):
    def plain(x, kernel):
        return _by_compiler(x, kernel, strides=strides, padding=padding)

    images, weight = random(2, *size, channels), random(kernel, kernel, channels, 5, seed=1)
    check(lambda x, w: convolve(x, w, strides, padding), plain, images, weight)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 9, 7, 3), (1, 1, 1, 2), (1, 2, 3, 2)])
@pytest.mark.parametrize("levels", [None, 2])
def test_pooling(shape, levels):
    def plain(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=[(1, 1)] * 2)

    images = random(*shape) - 0.3
    if levels:  # ties everywhere, at zero too
        images = jnp.round(images * levels) / 4
    check(lambda x: max_pool(x, 3, 2, 1), plain, images)
    check(max_pool_rectified, lambda x: plain(nn.relu(x)), images)


@pytest.mark.parametrize("pool", [lambda x: max_pool(x, 3, 2, 1), max_pool_rectified])
def test_pooling_keeps_a_nan(pool):
    images = np.full((9, 3, 3, 1), -1.0)
    for place, image in enumerate(images):  # each at another place
        image.flat[place] = np.nan
    expected = nn.max_pool(images, (3, 3), strides=(2, 2), padding=[(1, 1)] * 2)
    np.testing.assert_array_equal(np.isnan(pool(jnp.asarray(images))), np.isnan(expected))


def test_sums():
    x, y = random(2, 35, 4, 3), random(2, 35, 4, 3, seed=1)
    for found, expected in zip(channel_sums(x, y), (x, y), strict=True):
        np.testing.assert_allclose(found, expected.sum((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(channel_sum(x), x.sum((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (6, 3), (4, 5, 7, 3), (2, 1, 1, 3)])
def test_batch_normalisation(shape):
    def plain(x, scale, bias):
        axes = tuple(range(x.ndim - 1))
        return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) * scale + bias

    def ours(x, scale, bias):
        return batch_normalize(x, scale, bias, 1e-5)[0]

    arguments = random(*shape), random(3, seed=1), random(3, seed=2)
    check(ours, plain, *arguments)
    x = arguments[0].reshape(-1, 3)
    _, mean, var = batch_normalize(*arguments, 1e-5)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var, x.var(0), rtol=1e-12)


@pytest.mark.parametrize("mean", [0, 1e2, 1e4])
def test_one_pass_keeps_the_digits_of_two(mean):
    values = (np.random.default_rng(0).normal(mean, 1, (64, 24, 24, 8))).astype(np.float32)
    exact = values.astype(np.float64).reshape(-1, 8)
    _, found_mean, found_var = batch_normalize(
        jnp.asarray(values), jnp.ones(8, "float32"), jnp.zeros(8, "float32"), 1e-5
    )

    def two_passes(x):
        return x.mean((0, 1, 2)), jnp.square(x - x.mean((0, 1, 2))).mean((0, 1, 2))

    rivals = jax.jit(two_passes)(values)
    error_of_mean, rivals_error = (
        np.abs(each - exact.mean(0)).max() for each in (found_mean, rivals[0])
    )
    assert error_of_mean < max(1.5 * rivals_error, 5e-6)
    # A CPU adds up in one running total, which loses digits as well; the square of a mean of 1e4
    # would leave none.
    np.testing.assert_allclose(found_var, exact.var(0), rtol=1e-4)


def test_a_channel_of_one_value_has_no_negative_variance():
    x = jnp.full((4, 3, 3, 2), 0.1, "float32").at[1, 2, 2].add(1e-7)
    y, _, var = batch_normalize(x, jnp.ones(2, "float32"), jnp.zeros(2, "float32"), 1e-5)
    assert (var >= 0).all()
    assert np.isfinite(y).all()


def test_batch_normalisation_keeps_what_it_was_given():
    x = random(4, 5, 6, 3).astype("bfloat16")
    ones = jnp.ones(3, "float32")
    (y, mean, _), pull = jax.vjp(lambda x: batch_normalize(x, ones, ones, 1e-5), x)
    assert (y.dtype, mean.dtype) == ("float32", "float32")
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
    assert [leaf.dtype for leaf in kept] == ["bfloat16"]
    assert pull((y, mean, mean))[0].dtype == "bfloat16"


def test_a_bias_that_is_taken_away_again_has_no_gradient():
    x, bias = random(4, 5, 6, 3), random(3, seed=1)
    check(add_bias, lambda x, bias: x + bias, x, bias)
    y, pull = jax.vjp(lambda x, bias: add_bias(x, bias, True), x, bias)
    np.testing.assert_array_equal(y, x + bias)
    to_input, to_bias = pull(y)
    np.testing.assert_array_equal(to_input, y)
    np.testing.assert_array_equal(to_bias, jnp.zeros(3))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm", [BatchNorm, Halves])
def test_only_what_batch_normalisation_takes_away_has_no_gradient(norm, train):
    block = Residual(4, norm=norm)
    x = random(2, 5, 5, 4).astype("float32")
    variables = jax.jit(block.init)(jax.random.key(0), x)

    def loss(params):
        y, _ = block.apply({**variables, "params": params}, x, train, mutable=["batch_stats"])
        return (y**2).sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    zero = train and norm is BatchNorm
    for name in ("conv1", "conv2"):
        assert (gradients[name]["bias"] == 0).all() == zero
