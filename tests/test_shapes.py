"""The shapes and dtypes that public functions are annotated with are those that they work on."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from resnet_flax.nn import preprocessing
from resnet_flax.nn.blocks import Bottleneck, Residual, Stage
from resnet_flax.nn.layers import BatchNorm, Conv, Dense
from resnet_flax.nn.ops import convolution
from resnet_flax.nn.ops import normalization as operations
from resnet_flax.nn.ops.pooling import average_pool, max_pool, max_pool_rectified
from resnet_flax.nn.resnet import ResNet
from resnet_flax.training import recipes
from resnet_flax.training import step as training
from resnet_flax.training.metrics import Metrics

FAST = recipes.RECIPES["fast"]
KEY = jax.eval_shape(lambda: jax.random.key(0))


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def traced(function, *arguments, **options):
    """Checks the annotations while JAX traces the function, which computes nothing."""
    checked = jaxtyped(typechecker=beartype)(inspect.unwrap(function))
    return jax.eval_shape(partial(checked, **options), *arguments)


PIXELS = integers(4, 6, 6, 3, dtype=jnp.uint8)
FUNCTIONS = {
    "add_bias": (operations.add_bias, [floats(4, 6, 6, 3), floats(3)]),
    "augment": (
        partial(preprocessing.augment, random_resized_crop=0.5, shift=1, flip=True, erase=0.5),
        [KEY, floats(4, 6, 6, 3)],
    ),
    "average_pool": (partial(average_pool, window=2), [floats(4, 5, 6, 3)]),
    "batch_normalize": (
        partial(operations.batch_normalize, epsilon=1e-5),
        [floats(4, 3), floats(3), floats(3)],
    ),
    "channel_sum": (operations.channel_sum, [floats(4, 6, 6, 3)]),
    "channel_sums": (operations.channel_sums, [floats(4, 6, 6, 3), floats(4, 6, 6, 3)]),
    "convolve": (
        partial(convolution.convolve, strides=2, padding=1),
        [floats(4, 6, 6, 3), floats(3, 3, 3, 5)],
    ),
    "max_pool": (
        partial(max_pool, window=3, strides=2, padding=1),
        [floats(4, 6, 6, 3)],
    ),
    "max_pool_rectified": (max_pool_rectified, [floats(4, 6, 6, 3)]),
    "prepare_images": (partial(preprocessing.prepare_images, image_size=8), [PIXELS]),
    "resize": (partial(preprocessing.resize, image_size=8), [PIXELS]),
    "resized_crop": (
        preprocessing.resized_crop,
        [floats(4, 6, 6, 3), floats(4, 2), floats(4, 2)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    partly, arguments = FUNCTIONS[name]
    function, options = getattr(partly, "func", partly), getattr(partly, "keywords", {})
    traced(function, *arguments, **options)
    last = arguments[-1]
    wrong = jax.ShapeDtypeStruct(last.shape, jnp.complex64)  # no function is annotated with it
    with pytest.raises(TypeCheckError):
        traced(function, *arguments[:-1], wrong, **options)


@pytest.mark.parametrize(
    "module",
    [
        Conv(5, 3),
        BatchNorm(),
        Residual(3),
        Bottleneck(3, use_1x1conv=True),
        Stage(5, 2),
        ResNet((1, 1), channels=4),
        ResNet((1, 1), channels=4, stem="deep", average_shortcut=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules(module):
    method = jaxtyped(typechecker=beartype)(type(module).__call__)
    start = partial(module.init, jax.random.key(0), method=method)
    jax.eval_shape(start, floats(4, 8, 8, 3))
    with pytest.raises(TypeCheckError):
        jax.eval_shape(start, integers(4, 8, 8, 3))


def test_the_dense_layer():
    method = jaxtyped(typechecker=beartype)(Dense.__call__)
    start = partial(Dense(5).init, jax.random.key(0), method=method)
    jax.eval_shape(start, floats(4, 3))
    with pytest.raises(TypeCheckError):
        jax.eval_shape(start, floats(4, 3, 2))


def test_the_steps():
    data = training.Images.place(np.zeros(PIXELS.shape, np.uint8), np.arange(4, dtype=np.int32))
    model = ResNet((1,), channels=4)
    state = jax.eval_shape(
        lambda: training.create_train_state(model, optax.sgd(0.1), data, average=True)
    )
    metrics = jax.eval_shape(Metrics.empty)
    options = {"image_size": 8, **FAST.step_options()}
    images, labels = integers(2, 6, 6, 3, dtype=jnp.uint8), integers(2)
    traced(training.train_step, state, metrics, images, labels, **options)
    traced(training.train_steps, state, metrics, data, integers(1, 2), integers(), **options)
    traced(training.eval_step, state, metrics, images, labels, floats(2), image_size=8)
    with pytest.raises(TypeCheckError):
        traced(training.train_step, state, metrics, images, integers(1, 2), **options)
    with pytest.raises(TypeCheckError):
        traced(training.eval_step, state, metrics, images, labels, floats(3), image_size=8)
