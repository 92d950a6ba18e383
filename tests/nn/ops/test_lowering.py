"""What a GPU would be given, seen from a machine without one."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    # The layers have 11 shapes: 11 forward, 11 for the kernels, and 10 for the inputs, which the
    # images do not need.
    assert len(convolutions) == 32
    short = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    for line in convolutions:
        types = set(re.findall(r"tensor<[\dx]+x(\w+)>", line))
        assert types == {short}, line


def test_nothing_needs_the_host_or_double_precision(program):
    _, text = program
    assert "f64" not in text
    assert "callback" not in text
    assert "infeed" not in text


def test_a_gpu_gets_the_compilers_own_operations(program):
    _, text = program
    assert "reduce_window" in text or "select_and_scatter" in text
    assert "stablehlo.while" not in text


def test_several_steps_are_one_program():
    text = lower_for_cuda((4, 256))
    assert text.count("stablehlo.while") == 1
    assert "callback" not in text
