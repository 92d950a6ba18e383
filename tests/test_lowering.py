"""What a GPU would be given, seen from a machine without one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_flax.metrics import Metrics
from resnet_flax.model import build_model
from resnet_flax.training import Images, create_train_state, train_step


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def program(request):
    """The default recipe's step, lowered for CUDA, and the dtype of its computation."""
    images, labels = np.zeros((512, 28, 28, 1), np.uint8), np.zeros(512, np.int32)
    data = Images.place(images, labels)
    model = build_model("resnet18", dtype=request.param)
    state = create_train_state(model, optax.sgd(0.05), data, 0)
    step = jax.jit(
        lambda state, metrics, data, indices: train_step(
            state, metrics, data, indices, image_size=96
        )
    )
    indices = jax.ShapeDtypeStruct((256,), jnp.int32)
    traced = step.trace(state, Metrics.empty(), data, indices)
    return request.param, traced.lower(lowering_platforms=("cuda",)).as_text()


def test_convolutions_compute_in_the_dtype_that_was_asked_for(program):
    dtype, text = program
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    # 20 forward, 20 for the kernels, and 19 for the inputs, which the images do not need.
    assert len(convolutions) in (59, 60)
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
