import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from resnet_flax.nn.layers import (
    BatchNorm,
    Conv,
    Dense,
    kaiming_normal,
    pytorch_uniform,
)
from resnet_flax.nn.ops.platform import traced_for

KEY = jax.random.key(0)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(1.0, 2.0, shape).astype(np.float32)


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("size", [5, 6, 27, 28])
@pytest.mark.parametrize(("kernel", "strides", "padding"), [(7, 2, 3), (3, 2, 1), (1, 2, 0)])
def test_convolution_pads_all_four_edges_as_pytorch(size, kernel, strides, padding):
    images = random_images(2, size, size, 3)
    conv = Conv(4, kernel, strides, padding)
    ours, variables = jax.jit(conv.init_with_output)(KEY, images)
    weight = np.array(variables["params"]["kernel"]).transpose(3, 2, 0, 1)
    theirs = torch.nn.functional.conv2d(
        nchw(images),
        torch.from_numpy(np.ascontiguousarray(weight)),
        torch.from_numpy(np.array(variables["params"]["bias"])),
        stride=strides,
        padding=padding,
    )
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_dilation_and_groups_are_pytorchs():
    images, dilation, groups = random_images(2, 9, 8, 4), 2, 4
    conv = Conv(8, 3, 2, dilation, dilation=dilation, groups=groups)
    ours, variables = conv.init_with_output(KEY, images)
    kernel, bias = (np.array(variables["params"][name]) for name in ("kernel", "bias"))
    theirs = torch.nn.Conv2d(4, 8, 3, 2, dilation, dilation, groups)
    weight = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    theirs.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    expected = theirs(nchw(images)).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"must have shape \(N, H, W, 4\), not \(2, 9, 8, 2\)"):
        conv.apply(variables, images[..., :2])


def test_batch_norm_follows_pytorch_over_steps():
    ours, theirs = BatchNorm(), torch.nn.BatchNorm2d(3)
    variables = ours.init(KEY, jnp.zeros((1, 2, 2, 3)))
    for step in range(3):
        images = random_images(2, 3, 3, 3) * (step + 1)
        expected = theirs(nchw(images)).detach().permute(0, 2, 3, 1)
        out, update = ours.apply(variables, images, train=True, mutable=["batch_stats"])
        variables = {**variables, **update}
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        stats = variables["batch_stats"]
        np.testing.assert_allclose(stats["mean"], theirs.running_mean, rtol=1e-5)
        np.testing.assert_allclose(stats["var"], theirs.running_var, rtol=1e-5)
    expected = theirs.eval()(nchw(images)).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.apply(variables, images), expected, rtol=1e-5, atol=1e-5)


def test_running_variance_is_unbiased_and_normalisation_is_biased():
    images = jnp.asarray([0.0, 2.0]).reshape(2, 1, 1, 1)  # biased variance 1, unbiased 2
    variables = BatchNorm().init(KEY, images)
    out, update = BatchNorm().apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(update["batch_stats"]["var"], [0.9 * 1 + 0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(out.ravel(), [-1, 1], rtol=1e-4)


def test_batch_norm_keeps_precision_far_from_zero():
    images = (random_images(8, 16, 16, 2) / 100 + 100).astype(np.float32)
    variables = BatchNorm().init(KEY, images)
    out, _ = BatchNorm().apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(np.std(out, axis=(0, 1, 2)), 1, rtol=0.02)


def test_batch_norm_computes_statistics_in_float32_under_bfloat16():
    images = jnp.asarray(random_images(4, 8, 8, 2), jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(KEY, images)
    out, update = norm.apply(variables, images, train=True, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, update))} == {jnp.dtype("float32")}
    exact = 0.1 * np.asarray(images, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(update["batch_stats"]["mean"], exact, rtol=1e-5)


def test_batch_norm_refuses_one_value_per_channel():
    images = jnp.ones((1, 1, 1, 3))
    variables = BatchNorm().init(KEY, images)
    with pytest.raises(ValueError, match=r"more than one value.*\(1, 1, 1, 3\)"):
        BatchNorm().apply(variables, images, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_parts_of_a_batch_are_normalised_as_batches_of_their_own(platform):
    images = random_images(6, 3, 3, 2) + 5 * np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1)
    weights = np.random.default_rng(1).normal(size=images.shape)
    variables = BatchNorm().init(KEY, images)
    params = {"scale": jnp.asarray([0.5, 2.0]), "bias": jnp.asarray([1.0, -1.0])}

    def total(params, images, norm, weights):
        out, update = norm.apply({**variables, "params": params}, images, True, mutable=True)
        return (out * weights).sum(), (out, update["batch_stats"])

    with jax.enable_x64(True), traced_for(platform):
        images, params = images.astype(np.float64), jax.tree.map(jnp.float64, params)
        differentiate = jax.value_and_grad(total, (0, 1), has_aux=True)
        apart = BatchNorm(groups=3, dtype="float64")
        (_, (out, statistics)), gradients = differentiate(params, images, apart, weights)
        alone = BatchNorm(dtype="float64")
        parts = [
            differentiate(params, images[rows], alone, weights[rows])
            for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
        ]
        np.testing.assert_allclose(out, np.concatenate([p[0][1][0] for p in parts]), atol=1e-12)
        expected = np.concatenate([p[1][1] for p in parts])
        np.testing.assert_allclose(gradients[1], expected, atol=1e-12)
        # What the parts would have made of it each: their mean, and for parameters the sum.
        means = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(p[0][1][1] for p in parts))
        chex.assert_trees_all_close(statistics, means, rtol=1e-12)
        sums = jax.tree.map(lambda *leaves: sum(leaves), *(p[1][0] for p in parts))
        chex.assert_trees_all_close(gradients[0], sums, rtol=1e-12)
        whole = differentiate(params, images, alone, weights)[0][1][0]
        assert np.abs(whole - out).max() > 0.1


@pytest.mark.parametrize("shape", [(5, 2, 2, 3), (4, 1, 1, 3), (1, 2, 2, 3)])
def test_a_batch_that_has_no_such_parts_is_one(shape):
    images = random_images(*shape)
    variables = BatchNorm().init(KEY, images)
    found, expected = (
        norm.apply(variables, images, True, mutable=["batch_stats"])
        for norm in (BatchNorm(groups=4), BatchNorm())
    )
    chex.assert_trees_all_equal(found, expected)


def test_initial_values_have_the_bounds_of_d2l_and_pytorch():
    inputs, outputs, size = 32, 64, 3
    images = jnp.zeros((1, 8, 8, inputs))
    params = Conv(outputs, size).init(KEY, images)["params"]
    fan_in, fan_out = inputs * size**2, outputs * size**2
    assert_uniform(params["kernel"], (6 / (fan_in + fan_out)) ** 0.5)
    assert_uniform(params["bias"], fan_in**-0.5, samples=64)
    params = Dense(100).init(KEY, jnp.zeros((1, 50)))["params"]
    assert_uniform(params["kernel"], (6 / 150) ** 0.5)
    assert_uniform(params["bias"], 50**-0.5, samples=100)
    params = Dense(100, pytorch_uniform).init(KEY, jnp.zeros((1, 50)))["params"]
    assert_uniform(params["kernel"], 50**-0.5)
    params = Conv(outputs, size, kernel_init=kaiming_normal).init(KEY, images)["params"]
    np.testing.assert_allclose(np.std(params["kernel"]), (2 / fan_out) ** 0.5, rtol=0.03)
    assert np.abs(params["kernel"]).max() > 3 * (2 / fan_out) ** 0.5  # not truncated
    # A group's kernels meet the group's channels alone.
    params = Conv(outputs, size, groups=4).init(KEY, images)["params"]
    fan_in = inputs // 4 * size**2
    assert_uniform(params["kernel"], (6 / (fan_in + fan_out)) ** 0.5, samples=4608)
    assert_uniform(params["bias"], fan_in**-0.5, samples=64)


def assert_uniform(values: jax.Array, bound: float, samples: int = 5000) -> None:
    values = np.ravel(values)
    assert len(values) >= samples
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > bound * (1 - 20 / samples)
    np.testing.assert_allclose(np.std(values), bound / 3**0.5, rtol=3 / samples**0.5)
