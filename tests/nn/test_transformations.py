"""Every transformation of JAX does to our layers what it does to Flax's own, value for value."""

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import lax

from resnet_flax import Bottleneck, Residual, ResNet, Stage, build_model
from resnet_flax.errors import InputError
from resnet_flax.nn.layers import BatchNorm, Conv, Dense
from resnet_flax.nn.ops import convolution
from resnet_flax.nn.ops.convolution import convolve
from resnet_flax.nn.ops.normalization import add_bias, batch_normalize
from resnet_flax.nn.ops.platform import traced_for
from resnet_flax.nn.ops.pooling import average_pool, max_pool
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.step import create_train_state, train_step
from tests.support.transformations import (
    TRANSFORMATIONS,
    by_batch,
    check_same,
    compare,
    like,
    our_resnet,
    plain_block,
)

ROOT = Path(__file__).parents[2]
ON_DEVICES = ("pmap", "shard_map")


def some_quick(names, quick):
    """The names, of which those that are not quick are longer proofs: each takes 5 to 40 s."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in names]


# The operations below are tried in every direction.
@pytest.mark.parametrize(
    "name",
    some_quick([name for name in TRANSFORMATIONS if name not in ON_DEVICES], ["jvp_of_parameters"]),
)
def test_a_network_is_transformed_as_one_of_flaxs_layers(name):
    with jax.enable_x64(True):
        compare(name)


@pytest.mark.slow
def test_so_it_is_on_two_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.transformations", *ON_DEVICES],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "".join(f"{name} on 2 devices\n" for name in ON_DEVICES), done.stderr


@pytest.mark.parametrize(
    "lift",
    [
        nn.remat,
        partial(
            nn.vmap,
            in_axes=0,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        ),
        partial(
            nn.scan,
            length=2,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        ),
    ],
    ids=["remat", "vmap", "scan"],
)
def test_flaxs_lifted_transformations(lift):
    class Body(nn.Module):
        block: object

        @nn.compact
        def __call__(self, x, _=None):
            return self.block(4, name="block")(x, True), None

    def gradients(block, variables, x):
        def loss(params, x):
            y, _ = lift(Body)(block).apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return (y[0] ** 2).sum()

        arguments = variables["params"], x
        return jax.grad(loss, (0, 1))(*arguments), jax.jvp(loss, arguments, arguments)

    with jax.enable_x64(True):
        dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        ours = partial(Residual, conv=partial(Conv, **dtypes), norm=partial(BatchNorm, **dtypes))
        x = jax.random.normal(jax.random.key(0), (2, 2, 5, 4, 4))
        x = x if "vmap" in str(lift) else x[0]
        variables = jax.jit(lift(Body)(ours).init)(jax.random.key(1), x)
        found = (
            jax.jit(partial(gradients, b))(variables, x) for b in (ours, plain_block(**dtypes))
        )
        check_same(*found)


def plain_norm(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) * scale + bias


def plain_average(x, window):
    counts = nn.avg_pool(jnp.ones_like(x), (window,) * 2, (window,) * 2, [(0, 1)] * 2)
    return nn.avg_pool(x, (window,) * 2, (window,) * 2, [(0, 1)] * 2) / counts


def conv_case(shape, kernel, strides, padding, dilation=1):
    return (
        lambda x, w: convolve(x, w, strides, padding, dilation),
        lambda x, w: convolution._by_compiler(
            x, w, strides=strides, padding=padding, dilation=dilation
        ),
        (shape, kernel),
    )


OPERATIONS = {
    "winograd": conv_case((2, 4, 4, 3), (3, 3, 3, 4), 1, 1),
    "winograd 3x3": conv_case((2, 3, 3, 3), (3, 3, 3, 4), 1, 1),
    "stem": conv_case((2, 10, 8, 1), (7, 7, 1, 4), 2, 3),
    "1x1": conv_case((2, 5, 5, 3), (1, 1, 3, 4), 2, 0),
    "groups": conv_case((2, 6, 5, 4), (3, 3, 2, 4), 2, 1),
    "dilation": conv_case((2, 6, 6, 2), (3, 3, 2, 4), 1, 2, 2),
    "bias": (add_bias, lambda x, bias: x + bias, ((2, 3, 3, 4), (4,))),
    "norm": (
        lambda x, scale, bias: batch_normalize(x, scale, bias, 1e-5)[0],
        plain_norm,
        ((2, 3, 3, 4), (4,), (4,)),
    ),
    "max": (
        lambda x: max_pool(x, 3, 2, 1),
        lambda x: nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2),
        ((2, 5, 6, 3),),
    ),
    "average": (
        lambda x: average_pool(x, 2),
        lambda x: plain_average(x, 2),
        ((2, 5, 5, 3),),
    ),
}
LINEAR = {"winograd", "winograd 3x3", "stem", "1x1", "groups", "dilation", "average"}


def in_every_direction(function, name, inputs):
    """Tangents, gradients, both of both, batched, and all that within a shard_map."""

    def loss(*inputs):
        return (function(*inputs) ** 3).sum()

    everywhere = tuple(range(len(inputs)))
    tangents = tuple(like(x, seed) for seed, x in enumerate(inputs))
    found = [
        jax.jvp(jax.grad(loss, everywhere), inputs, tangents),
        jax.grad(lambda *xs: jax.jvp(loss, xs, tangents)[1], everywhere)(*inputs),
    ]
    batch = jnp.stack([inputs[0], tangents[0]]), *inputs[1:]
    mapped = jax.vmap(function, (0, *[None] * len(inputs[1:])))
    found.append(jax.grad(lambda *batch: (mapped(*batch) ** 3).sum(), everywhere)(*batch))
    if name in LINEAR:
        transpose = jax.linear_transpose(lambda x: function(x, *inputs[1:]), inputs[0])
        found.append(transpose(function(*inputs)))

    mesh, axis = jax.sharding.Mesh(jax.devices()[:1], ("data",)), "data"
    specs = jax.P(axis), *[jax.P()] * (len(inputs) - 1)

    def shared(*inputs):
        def mean(*inputs):
            return lax.pmean(loss(*inputs), axis)

        gradients = jax.grad(mean, everywhere)(*inputs)
        return gradients, lax.pmean(jax.jvp(loss, inputs, inputs)[1], axis)

    local = jax.shard_map(shared, mesh=mesh, in_specs=specs, out_specs=(specs, jax.P()))
    return found, local(*inputs)


@pytest.mark.parametrize(
    ("name", "accelerator"),
    [
        pytest.param(
            name, accelerator, marks=[pytest.mark.slow] * ("winograd" in name or accelerator)
        )
        for name in OPERATIONS
        for accelerator in (False, True)
        if not accelerator or name in ("stem", "1x1", "bias", "norm", "max")
    ],
)
def test_every_formulation_is_differentiated_in_every_direction(name, accelerator, request):
    if "winograd" in name:
        request.getfixturevalue("winograd_everywhere")
    ours, plain, shapes = OPERATIONS[name]

    @jax.jit
    def both(inputs):
        return tuple(in_every_direction(function, name, inputs) for function in (ours, plain))

    with jax.enable_x64(True):
        inputs = tuple(
            jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(shapes)
        )
        with traced_for("gpu" if accelerator else None):
            found = both(inputs)
        check_same(*found)


FLAGS = {
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "enable_x64": lambda: jax.enable_x64(True),
    "checking_leaks": lambda: jax.checking_leaks(),
    "disable_jit": lambda: jax.disable_jit(),
}


@pytest.mark.parametrize(
    "flag", some_quick(FLAGS, ["rank_promotion", "dtype_promotion", "checking_leaks"])
)
def test_values_are_the_same_under_jaxs_flags(flag):
    model = our_resnet(jnp.float32)
    x = jax.random.uniform(jax.random.key(0), (2, 12, 12, 1), jnp.float32)

    def everything(variables):
        apply = by_batch(model, variables["batch_stats"])
        params = variables["params"]

        def loss(params):
            return (apply(params, x) ** 2).mean()

        return jax.value_and_grad(loss)(params), jax.jvp(loss, (params,), (params,))

    variables = jax.jit(model.init)(jax.random.key(1), x)
    expected = jax.jit(everything)(variables)
    jax.clear_caches()
    compiled = flag not in ("debug_infs", "disable_jit")
    with FLAGS[flag]():
        found = (jax.jit(everything) if compiled else everything)(variables)
    check_same(found, expected, 1e-5)


@pytest.mark.parametrize("flag", ["rank_promotion", "dtype_promotion"])
@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "bfloat16"},
        {"stem": "deep", "average_shortcut": True, "block": Bottleneck, "groups": 2},
        {"preactivation": True, "dropout_rate": 0.1, "stochastic_depth_rate": 0.5},
    ],
)
def test_a_training_step_promotes_nothing_by_itself(flag, fields):
    model = ResNet((1, 1), channels=4, num_classes=3, **fields)
    data = np.zeros((2, 16, 16, 1), np.uint8), np.zeros(2, np.int32)
    options = {"label_smoothing": 0.1, "shift": 1, "flip": True, "erase": 0.5}
    step = partial(train_step, image_size=20, average_decay=0.9, **options)
    with FLAGS[flag]():
        start = partial(create_train_state, model, optax.sgd(0.1), data, average=True)
        jax.eval_shape(step, jax.eval_shape(start), Metrics.empty(), *data)


@pytest.mark.parametrize(
    "model",
    [
        build_model("resnet18"),
        build_model("resnext50_32x4d", "torchvision", dtype="bfloat16"),
        Residual(8),
        Stage(8, 2, dilations=[1, 1], stochastic_depth_rates=[0.0, np.float32(0.5)]),
        Conv(np.int64(4), 3, param_dtype="float32"),
        Dense(4),
        BatchNorm(momentum=np.float64(0.5)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_module_hashes_and_pickles(model):
    copy = pickle.loads(pickle.dumps(model))
    assert copy == model
    assert hash(copy) == hash(model)


def test_fields_become_plain():
    plain = ResNet((1, 2), channels=8, momentum=0.5, dtype=jnp.bfloat16)
    given = ResNet(
        np.array([1, 2]), channels=np.int8(8), momentum=jnp.float32(0.5), dtype="bfloat16"
    )
    assert given == plain
    assert hash(given) == hash(plain)
    assert type(given.channels) is int
    block = Residual(np.int64(8), strides=np.int32(2), use_1x1conv=np.bool_(True))
    assert block == Residual(8, strides=2, use_1x1conv=True)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ResNet("11"), "stage_sizes"),
        (lambda: ResNet([1.5]), "stage_sizes"),
        (lambda: ResNet((1,), block="Bottleneck"), "block"),
        (lambda: ResNet((1,), num_classes=[10]), "num_classes"),
        (lambda: ResNet((1,), num_classes=-1), "num_classes"),
        (lambda: ResNet((1,), frozen_stages="1"), "frozen_stages"),
        (lambda: ResNet((1,), dtype="float33"), "dtype"),
        (lambda: ResNet((1,), dtype=None), "dtype"),
        (lambda: ResNet((1,), param_dtype=int), "param_dtype"),
        (lambda: ResNet((1,), conv_init=0.1), "conv_init"),
        (lambda: Residual(8, strides=(2, 2)), "strides"),
        (lambda: Bottleneck(8.0), "num_channels"),
        (lambda: Stage(8, "2"), "num_residuals"),
        (lambda: Stage(8, 2, stochastic_depth_rates=0.1), "stochastic_depth_rates"),
        (lambda: Conv(8, (3, 3)), "kernel_size"),
        (lambda: Dense(None), "features"),
        (lambda: BatchNorm(epsilon="small"), "epsilon"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(make, name):
    with pytest.raises(InputError, match=f"^{name} cannot be "):
        make()
