"""PyTorch's names and files: state dicts and checkpoints, both ways."""

from resnet_flax.weights.files import (
    SAFETENSORS,
    load_safetensors,
    read_checkpoint,
    save_safetensors,
    write_checkpoint,
)
from resnet_flax.weights.keys import LAYOUTS
from resnet_flax.weights.state_dict import from_torch, to_torch, variable_shapes
from resnet_flax.weights.transfer import convert, guess_model, start_from

__all__ = [
    "LAYOUTS",
    "SAFETENSORS",
    "convert",
    "from_torch",
    "guess_model",
    "load_safetensors",
    "read_checkpoint",
    "save_safetensors",
    "start_from",
    "to_torch",
    "variable_shapes",
    "write_checkpoint",
]
