"""D2L's table of output shapes: ``python -m resnet_flax.summary --model resnet18``."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_flax.commands.command_line import OneLineParser, run_command
from resnet_flax.errors import InputError
from resnet_flax.nn.layers import Conv, Dense
from resnet_flax.nn.resnet import ARCHITECTURES, FLAVOURS, ResNet, build_model


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        layer: its name.
        output: its output's shape for one image, (H, W, C) or (C,).
        parameters: number of its parameters.
        multiply_adds: of its convolutions and dense layers, for one image.
    """

    layer: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


def summarize(model: ResNet, image_size: int, channels: int = 1) -> list[Row]:
    """Traces one image through the network, without computing anything.

    Args:
        model: the network.
        image_size: height and width of the image, in pixels.
        channels: channels of the image.

    Returns:
        The stem, each stage, the pooling and the dense layer, as D2L lists them.
    """
    calls: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = []

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(output, jax.Array):
            calls.append((context.module, args[0].shape[1:], output.shape[1:]))
        return output

    image = jnp.zeros((1, image_size, image_size, channels))
    with nn.intercept_methods(record):
        variables = jax.eval_shape(model.init, jax.random.key(0), image)

    parameters: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        parameters[path[0].key] = parameters.get(path[0].key, 0) + leaf.size
    multiply_adds = dict.fromkeys(parameters, 0)
    shapes = {}
    for module, inputs, outputs in calls:
        if module.path:
            multiply_adds[module.path[0]] += _multiply_adds(module, inputs, outputs)
        if len(module.path) == 1:
            shapes[module.path[0]] = (inputs, outputs)

    stages = [f"layer{index + 1}" for index in range(len(model.stage_sizes))]
    stem = [name for name in ("conv1", "bn1") if name in parameters]
    pooled = shapes[stages[-1]][1][-1:]
    rows = [
        Row(
            "stem",
            shapes[stages[0]][0],
            sum(parameters[name] for name in stem),
            sum(multiply_adds[name] for name in stem),
        )
    ]
    rows += [
        Row(f"stage {index}", shapes[name][1], parameters[name], multiply_adds[name])
        for index, name in enumerate(stages, start=1)
    ]
    rows.append(Row("global average pool", pooled, parameters.get("norm", 0), 0))
    if "fc" in parameters:
        rows.append(Row("dense", shapes["fc"][1], parameters["fc"], multiply_adds["fc"]))
    return rows


def print_table(rows: list[Row]) -> None:
    """Prints the rows and their sums on stdout."""
    print(f"{'layer':<20} {'output (H, W, C)':<18} {'parameters':>12} {'multiply-adds':>16}")
    for row in rows:
        print(f"{row.layer:<20} {row.output!s:<18} {row.parameters:>12,} {row.multiply_adds:>16,}")
    parameters, multiply_adds = (sum(column) for column in list(zip(*rows, strict=True))[2:])
    print(f"{'total':<39} {parameters:>12,} {multiply_adds:>16,}")


def main() -> None:
    """Prints the table of the network that the flags name."""
    parser = OneLineParser("python -m resnet_flax.summary", allow_abbrev=False)
    parser.add_argument("--model", default="resnet18", choices=ARCHITECTURES)
    parser.add_argument("--flavour", default="d2l", choices=FLAVOURS)
    parser.add_argument("--image-size", type=int, default=224, help="in pixels (default: 224)")
    parser.add_argument("--channels", type=int, default=1, help="of the image (default: 1)")
    parser.add_argument("--classes", type=int, default=10, help="outputs (default: 10)")
    options = parser.parse_args()
    for name in ("image_size", "channels", "classes"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    model = build_model(options.model, options.flavour, num_classes=options.classes)
    print_table(summarize(model, options.image_size, options.channels))


def _multiply_adds(module: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    if isinstance(module, Conv):
        height, width, features = outputs
        return height * width * features * module.kernel_size**2 * inputs[-1]
    if isinstance(module, Dense):
        return inputs[-1] * outputs[-1]
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
