"""Checkpoints as files: ``.safetensors``, and PyTorch's own format, which alone needs PyTorch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from resnet_flax.errors import InputError, one_line
from resnet_flax.machine.files import whole_file


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a safetensors file; bfloat16 comes as the dtype of `ml_dtypes`.

    Raises:
        InputError: when the file cannot be read or is damaged.
    """
    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all; one that exists is replaced.

    The metadata join ``format: pt``, which transformers asks for, in the header.

    Raises:
        InputError: when the file cannot be written.
    """
    # The library writes memory as it lies: an array that is not contiguous would be scrambled.
    arrays = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    with whole_file(path) as unfinished:
        try:
            save_file(arrays, unfinished, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # a full disk, too
            raise OSError(one_line(error)) from error


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a state dict, which training scripts often save beside other things.

    PyTorch's own format is read by ``torch.load(weights_only=True)``: never by unpickling.

    Raises:
        InputError: when the file cannot be read, or holds more than tensors and plain values.
    """
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path)
    torch = _import_torch(path)
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


def write_checkpoint(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as `save_safetensors` does, in the format of the file's ending."""
    if Path(path).suffix == ".safetensors":
        return save_safetensors(path, tensors)
    torch = _import_torch(path)
    # PyTorch takes no array of bfloat16, but its bits.
    state_dict = {
        key: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        if value.dtype.name == "bfloat16"
        else torch.from_numpy(value)
        for key, value in tensors.items()
    }
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state_dict, file)
    return None


def _import_torch(path: str | os.PathLike[str]) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} needs PyTorch, which is not installed: install torch, or use .safetensors"
        ) from error
    return torch
