"""Rewrites a PyTorch checkpoint in another layout of keys or another file format.

``python -m resnet_flax.convert resnet50.pth model.safetensors --model resnet50 --to huggingface``

A ``.safetensors`` file goes through the safetensors library. Any other is PyTorch's own format,
which needs PyTorch, and is read by ``torch.load(weights_only=True)``: never by unpickling.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_flax.commands.command_line import OneLineParser, run_command
from resnet_flax.errors import InputError
from resnet_flax.nn.resnet import ARCHITECTURES, FLAVOURS, ResNet, build_model
from resnet_flax.weights.keys import HEAD, LAYOUTS, match_keys
from resnet_flax.weights.state_dict import (
    from_torch,
    load_safetensors,
    save_safetensors,
    to_torch,
    variable_shapes,
)


def convert(arguments: Sequence[str] | None = None) -> None:
    """Reads, converts, checks and writes a checkpoint.

    Raises:
        InputError: when a file cannot be read or written, or is not of the model.
        SystemExit: for ``--help`` (code 0) and for unknown or malformed flags (code 2).
    """
    options = parse_arguments(arguments)
    state_dict = read_checkpoint(options.input)
    model = guess_model(options, state_dict)
    # With 64 bits a float64 checkpoint stays one; the others keep their dtype all the same.
    with jax.enable_x64(True):
        # The one thing left behind is the counter, which is passed on below.
        variables = from_torch(
            model, state_dict, dtype=options.dtype or "keep", report=lambda line: None
        )
        counts = {int(v) for key, v in state_dict.items() if key.endswith("num_batches_tracked")}
        count = max(counts, default=0)
        converted = to_torch(model, variables, options.to, num_batches_tracked=count)
    write_checkpoint(options.output, converted)
    print(f"{options.output}: {len(converted)} tensors, {options.to}'s keys")
    if len(counts) > 1:
        print(f"num_batches_tracked differed between layers ({sorted(counts)}): wrote {count}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ``--flavour`` and ``--dtype`` may stay None."""
    parser = OneLineParser(
        prog="python -m resnet_flax.convert", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("input", type=Path, metavar="IN", help="checkpoint; its layout is detected")
    parser.add_argument("output", type=Path, metavar="OUT", help="file to write or replace")
    parser.add_argument("--model", required=True, choices=ARCHITECTURES)
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout of the keys in OUT")
    parser.add_argument(
        "--flavour",
        choices=FLAVOURS,
        help="whose network it is (default: d2l if the first convolution has a bias)",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="(default: that of IN)"
    )
    parser.add_argument("--stem", choices=["imagenet", "cifar"], default="imagenet")
    parser.add_argument(
        "--width-multiplier",
        type=float,
        default=1.0,
        help="2 for wide_resnet50_2 (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def guess_model(options: argparse.Namespace, state_dict: Mapping[str, Any]) -> ResNet:
    """Builds the network that the options name; flavour and classes are the checkpoint's."""
    fields = {"stem": options.stem, "width_multiplier": options.width_multiplier}
    d2l = build_model(options.model, "d2l", **fields)
    keys = match_keys(variable_shapes(d2l, 1), state_dict)
    biased = keys["params", "conv1", "bias"] in state_dict
    flavour = options.flavour or ("d2l" if biased else "torchvision")
    head_bias = state_dict.get(keys[HEAD[1]])
    num_classes = 0 if head_bias is None else (*head_bias.shape, 0)[0]
    return build_model(options.model, flavour, num_classes=num_classes, **fields)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a state dict, which training scripts often save beside other things.

    Raises:
        InputError: when the file cannot be read, or holds more than tensors and plain values.
    """
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    torch = import_torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except Exception as error:  # a damaged file raises errors of many kinds
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} is damaged, or not a file of tensors alone (save net.state_dict(), not net): "
            f"{type(error).__name__}: {reason}"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(hasattr(v, "shape") for v in content.values()):
        raise InputError(f"{path} holds no state dict (a dictionary of tensors)")
    return {str(key): value for key, value in content.items()}


def write_checkpoint(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict; the file appears under its name only when it is complete.

    Raises:
        InputError: when the file cannot be written.
    """
    if path.suffix == ".safetensors":
        save_safetensors(path, tensors)
        return
    torch = import_torch(path)
    state_dict = {}
    for key, value in tensors.items():
        if value.dtype.name == "bfloat16":  # PyTorch takes no such array, but its bits
            state_dict[key] = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        else:
            state_dict[key] = torch.from_numpy(value)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(state_dict, file)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}") from error


def import_torch(path: Path) -> Any:
    """PyTorch, which only this program needs, and only for its own format."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} needs PyTorch, which is not installed: install torch, or use .safetensors"
        ) from error
    return torch


def main() -> None:
    """Converts what the command line names."""
    convert()


if __name__ == "__main__":
    sys.exit(run_command(main))
