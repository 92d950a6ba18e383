"""What a GPU would be given, seen from a machine without one."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_flax.nn.ops.platform import traced_for
from resnet_flax.nn.resnet import build_model
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.step import Images, create_train_state, train_steps


def lower_for_cuda(batch: tuple[int, ...], dtype: str = "float32") -> str:
    """The default recipe's network in a program for a GPU."""
    data = Images.place(np.zeros((512, 28, 28, 1), np.uint8), np.zeros(512, np.int32))
    model = build_model("resnet18", dtype=dtype)
    state = jax.eval_shape(lambda: create_train_state(model, optax.sgd(0.05), data, 0))
    program = jax.jit(partial(train_steps, image_size=96))
    indices = jax.ShapeDtypeStruct(batch, jnp.int32)
    traced = program.trace(state, Metrics.empty(), data, indices, jnp.int32(batch[0]))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def program(request):
    """A step, and the dtype of its computation."""
    return request.param, lower_for_cuda((1, 256), request.param)


def test_convolutions_compute_in_the_dtype_that_was_asked_for(program):
    dtype, text = program
    lines = text.splitlines()
    convolutions = [line for line in lines if "stablehlo.convolution" in line]
    products = [line for line in lines if "stablehlo.dot_general" in line]
    # The layers have 8 shapes, but for 1x1 convolutions: 8 forward, 8 for the kernels, and 7 for
    # the inputs, which the images do not need. Three 1x1 convolutions and the dense layer are
    # matrix products, each with two gradients.
    assert len(convolutions) == 23
    assert len(products) == 12
    short = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    for line in convolutions + products:
        types = set(re.findall(r"tensor<[\dx]+x(\w+)>", line))
        assert types == {short}, line


def test_the_stem_works_on_blocks_of_pixels(program):
    dtype, text = program
    short = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    blocks = f"(tensor<256x51x13x16x{short}>, tensor<4x2x16x256x{short}>)"
    assert text.count(blocks) == 1
    assert "7x7x1x64" in text  # the parameter
    assert not re.search(r"stablehlo.convolution.*7x7x1x64", text)


def test_barriers_stand_before_biases_and_strided_products_alone(program):
    _, text = program
    # As many as the network has convolutions; and at each of three shortcuts one before its
    # product, and two more for the gradients of that. The other layers have none in their backward.
    assert text.count("stablehlo.optimization_barrier") == 20 + 3 * (1 + 2)


@pytest.mark.parametrize("trains", [True, False])
def test_no_product_reads_every_second_pixel_itself(trains):
    """In evaluation XLA fuses these in jax 0.11, fails a check of its own, and ends the process."""
    model = build_model("resnet18")
    images = jax.ShapeDtypeStruct((8, 96, 96, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def forward(variables, images):
        return model.apply(variables, images, train=trains, mutable=["batch_stats"])

    lowered = jax.jit(forward).trace(variables, images).lower(lowering_platforms=("cuda",))
    strided = r"(%\d+) = stablehlo.slice %\S+ \[0:8, 0:(\d+):2, 0:\2:2, "
    behind = strided + r".*\n +%\d+ = stablehlo.optimization_barrier \1 :"
    for pattern in (strided, behind):
        found = re.findall(pattern, lowered.as_text())
        assert [side for _, side in found] == ["24", "12", "6"]


def test_what_is_kept_for_the_backward_pass_has_the_dtype_of_the_computation():
    model = build_model("resnet18", dtype="bfloat16")
    images = jax.ShapeDtypeStruct((8, 96, 96, 1), jnp.float32)

    def kept(images):
        variables = model.init(jax.random.key(0), images)

        def forward(params):
            return model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )

        return jax.vjp(forward, variables["params"])[1]

    with traced_for("gpu"):
        leaves = jax.tree.leaves(jax.eval_shape(kept, images))
    maps = [leaf for leaf in leaves if leaf.ndim == 4 and leaf.shape[0] == 8]
    assert {leaf.dtype.name for leaf in maps} == {"bfloat16", "bool", "uint8"}


def test_nothing_needs_the_host_or_double_precision(program):
    _, text = program
    assert "f64" not in text
    assert "callback" not in text
    assert "infeed" not in text


def test_a_gpu_neither_scatters_nor_loops(program):
    _, text = program
    assert "reduce_window" not in text
    assert "select_and_scatter" not in text
    assert "stablehlo.while" not in text


def test_several_steps_are_one_program():
    text = lower_for_cuda((4, 256))
    assert text.count("stablehlo.while") == 1
    assert "callback" not in text
