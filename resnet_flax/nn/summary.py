"""D2L's table of a network: the output shapes of its parts, their parameters, their work."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_flax.nn.layers import Conv, Dense
from resnet_flax.nn.resnet import ResNet


class Row(NamedTuple):
    """One line of the table, for one image."""

    layer: str
    output: tuple[int, ...]  # its output's shape, (H, W, C) or (C,)
    parameters: int
    multiply_adds: int  # of its convolutions and dense layers


def summarize(model: ResNet, image_size: int, channels: int = 1) -> list[Row]:
    """Traces one image, a square of that many pixels, without computing anything.

    Returns:
        The stem, each stage, the pooling and the dense layer, as D2L lists them.
    """
    calls: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = []

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(output, jax.Array):
            calls.append((context.module, args[0].shape[1:], output.shape[1:]))
        return output

    image = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
    with nn.intercept_methods(record):
        variables = jax.eval_shape(model.init, jax.random.key(0), image)

    parameters, multiply_adds = Counter[str](), Counter[str]()
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        parameters[path[0].key] += leaf.size
    shapes = {}
    for module, inputs, outputs in calls:
        if module.path:
            multiply_adds[module.path[0]] += _multiply_adds(module, inputs, outputs)
        if len(module.path) == 1:
            shapes[module.path[0]] = (inputs, outputs)

    rows = []
    for part, names in model.parts.items():
        if part == "stem":  # of which pooling, without a name, is the last
            output = shapes["layer1"][0]
        elif part == "global average pool":
            output = output[-1:]
        else:
            output = shapes[names[-1]][1]
        counts = (sum(count[name] for name in names) for count in (parameters, multiply_adds))
        rows.append(Row(part, output, *counts))
    return rows


def _multiply_adds(module: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    if isinstance(module, Conv):
        height, width, features = outputs
        return height * width * features * module.kernel_size**2 * inputs[-1] // module.groups
    if isinstance(module, Dense):
        return inputs[-1] * outputs[-1]
    return 0
