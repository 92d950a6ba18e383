"""Checkpoints as files: ``.safetensors``, and PyTorch's own format, which alone needs PyTorch."""

import contextlib
import errno
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from resnet_flax.errors import InputError, one_line, reason
from resnet_flax.machine.files import whole_file
from resnet_flax.weights.keys import averaged, listed

logger = logging.getLogger(__name__)

SAFETENSORS = (".safetensors", ".safetensors.index.json")  # endings
LONGEST_PART = 200  # letters of a name
# What comes in a checkpoint's place: how it begins, and what it is.
OTHERS = {
    rb"$": "damaged: it is empty",
    rb"version https://git-lfs": "a Git LFS pointer, not the weights: fetch them by git lfs pull",
    rb"(\xef\xbb\xbf)?\s*<": "a web page, not a checkpoint: download the file itself",
    rb"\x89HDF": "an HDF5 file, such as Keras writes: it holds no weights of PyTorch's",
    rb"\x1f\x8b\x08": "compressed by gzip: unpack it first",
}
# And what the one reader meets of the other's.
NO_SAFETENSORS = {
    rb".{6}\0\0\{": "",
    rb"PK\x03\x04|\x80[\x02-\x05]": "in PyTorch's format: convert it to .safetensors",
}
NO_TORCH = {
    rb".{6}\0\0\{": "in the format of safetensors: call it *.safetensors",
    rb"\x80[\x03-\x05]": "a pickle that torch.save did not write: save the tensors by torch.save",
}


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a safetensors file; bfloat16 comes as the dtype of `ml_dtypes`.

    Of a sharded checkpoint the path is that of its ``model.safetensors.index.json``.

    Raises:
        InputError: when a file cannot be read or is damaged, or a shard is outside of the folder.
    """
    return _read(Path(path), _load_safetensors)


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
        try:  # of a full disk the library would tell in words of its own
            content = save(arrays, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(one_line(error)) from error
        unfinished.write_bytes(content)


def read_checkpoint(path: str | os.PathLike[str], part: str | None = None) -> dict[str, Any]:
    """Reads a state dict, which training scripts often save beside other things.

    PyTorch's own format is read by ``torch.load(weights_only=True)``: never by unpickling. Shards
    are read by their index, ``*.index.json``. What is no tensor is left behind, and logged.

    Args:
        path: a file of safetensors, if its ending says so, or of PyTorch's.
        part: the name of the state dict, such as ``state_dict_ema``, of several in the file, or
            what the keys of one network begin with, such as ``module.encoder_q``; by default
            ``state_dict`` or ``model``, or the only one that is no average (EMA).

    Raises:
        InputError: when the file cannot be read, holds more than tensors and plain values, or
            several state dicts of which none is the one to take.
    """

    def load(file: Path) -> Any:
        return _load_safetensors(file) if file.suffix == ".safetensors" else _load_torch(file)

    content = _read(Path(path), load)
    found = _state_dicts(content)
    if not found:
        raise InputError(f"{path} holds no state dict (a dictionary of tensors)")
    if part is None:
        part = _usual_part(Path(path), [*found])
    if part not in found:
        within = (_under(part, *each) for each in found.items())
        if keys := next(filter(None, within), None):
            found[part] = keys
    if part not in found:
        raise InputError(f"{path} has no `part` {part!a:.100}, but {_shown(found)}")
    if others := [name for name in found if name != part]:
        logger.info("read %s of %s; `part` chooses %s", _shown([part]), path, _shown(others))
    if strays := [str(key) for key, value in found[part].items() if not _is_tensor(value)]:
        logger.info("left behind, being no tensors: %s", listed(strays))
    return {str(key): value for key, value in found[part].items() if _is_tensor(value)}


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
    content = io.BytesIO()  # PyTorch's own error on a full disk hides that it is full
    torch.save(state_dict, content)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.getvalue())
    return None


def _import_torch(path: str | os.PathLike[str]) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} needs PyTorch, which is not installed: install torch, or use .safetensors"
        ) from error
    return torch


def _read(path: Path, load: Callable[[Path], Any]) -> Any:
    """The content of a file, or of all the files that an index of shards lists."""
    places = _index(path)
    if places is None:
        return load(path)
    tensors: dict[str, Any] = {}
    for name in sorted({*places.values()}):
        try:
            shard = (path.parent / name).resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"cannot read {name!a:.200} of {path}: {reason(error)}") from error
        # In Hugging Face's cache index and shards are links to neighbours elsewhere.
        homes = path.parent.resolve(), path.resolve().parent
        if not any(shard.is_relative_to(home) for home in homes):
            raise InputError(f"{path} leads out of its folder, to {name!a:.200}")
        content = load(_file(path.parent / name))
        if not isinstance(content, Mapping):
            raise InputError(f"{path.parent / name} holds no state dict (a dictionary of tensors)")
        tensors |= content
    if lacking := places.keys() - tensors.keys():
        raise InputError(f"the shards of {path} lack {listed(sorted(lacking))}")
    return tensors


def _file(path: Path) -> Path:
    try:
        if path.is_file():  # reading a pipe would wait for ever
            return path
        why = "not a file" if path.exists() else "no such file"
    except OSError as error:
        why = reason(error)
    raise InputError(f"cannot read {path}: {why}")


def _index(path: Path) -> dict[str, str] | None:
    """Key -> file, if a file is an index of shards."""
    head = _head(path)
    if not re.match(rb"\s*\{", head) or b"\0" in head:
        return None
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        return places if all(isinstance(name, str) for name in places.values()) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        if dtype := re.search(r"'numpy' has no attribute '(float\w+)'", str(error)):
            raise InputError(
                f"{path} holds numbers of {dtype[1]}, which NumPy has not: save them as float32"
            ) from error
        why = _text(path) or reason(error)
        what = _other(path, NO_SAFETENSORS) or f"damaged or not a safetensors file: {why}"
        raise InputError(f"{path} is {what}") from error


def _load_torch(path: Path) -> Any:
    torch = _import_torch(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch warns of odd files
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises errors of many kinds
        # An archive that was cut is sought in before its beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise InputError(f"cannot read {path}: {reason(error)}") from error
        if objects := _objects(torch, path, str(error)):
            raise InputError(
                f"{path} is not a file of tensors alone: it holds {listed(objects)}, and reading "
                "such objects may run code; save the tensors alone, as in torch.save("
                "net.state_dict(), FILE) or, of a file that you trust, torch.save(torch.load(FILE, "
                'weights_only=False)["model"], NEW_FILE)'
            ) from error
        # PyTorch goes on with how to read it all the same.
        said = str(error).removeprefix("Weights only load failed. ")
        why = re.split(r"\n|\. ", said.rpartition("WeightsUnpickler error: ")[2].strip())[0]
        why = _text(path) or f"{type(error).__name__}: {listed([why])}"
        what = _other(path, NO_TORCH) or (
            f"damaged, or not a file of tensors alone (save net.state_dict(), not net): {why}"
        )
        raise InputError(f"{path} is {what}") from error


def _objects(torch: Any, path: Path, message: str) -> list[str]:
    """The names of what is in a PyTorch checkpoint and is no tensor, by an error's message."""
    refused = re.findall(r"GLOBAL (\S+)", message)
    if refused:  # the first of them
        with contextlib.suppress(Exception):  # it reads the newer format alone
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or refused
    return refused


def _other(path: Path, more: dict[bytes, str]) -> str:
    """What a file is that is no checkpoint, as far as its beginning tells."""
    kinds = more | OTHERS
    return next((kinds[begins] for begins in kinds if re.match(begins, _head(path), re.S)), "")


def _text(path: Path) -> str:
    """How a file begins, if that is text."""
    head = _head(path)
    words = " ".join(head.decode("ascii", "replace").split())[:60]
    return f"a text, {words!r}" if head.isascii() and words.isprintable() else ""


def _head(path: Path) -> bytes:
    with contextlib.suppress(OSError), _file(path).open("rb") as file:
        return file.read(100)
    return b""


def _state_dicts(content: Any) -> dict[str, Mapping[Any, Any]]:
    """Name -> each mapping that holds tensors for the most part; "" is the whole content's."""
    found: dict[str, Mapping[Any, Any]] = {}
    rest: dict[str, Mapping[Any, Any]] = {}
    seen = set()
    queue = [("", content)] if isinstance(content, Mapping) else []
    for name, mapping in queue:  # to which the mappings in it are added
        tensors = [str(key) for key, value in mapping.items() if _is_tensor(value)]
        if tensors and 2 * len(tensors) >= len(mapping):
            # An optimiser, or a log, keeps mappings of tensors too.
            weights = any(f".{key}".endswith(".weight") for key in tensors)
            (found if weights else rest)[name] = mapping
        if id(mapping) in seen or len(name) > LONGEST_PART:
            continue
        seen.add(id(mapping))
        inner = [(str(key), value) for key, value in mapping.items() if isinstance(value, Mapping)]
        queue += [(f"{name}.{key}" if name else key, value) for key, value in inner]
    return found or {name: rest[name] for name in rest if not name}


def _under(part: str, name: str, mapping: Mapping[Any, Any]) -> dict[str, Any]:
    """What a mapping of that name holds in a part that the keys begin with."""
    start = f"{part}.".removeprefix(f"{name}.")
    keys = {str(key): value for key, value in mapping.items()}
    return {key: value for key, value in keys.items() if start and key.startswith(start)}


def _usual_part(path: Path, names: list[str]) -> str:
    """The part that is meant where none is named."""
    usual = [name for name in ("state_dict", "model_state_dict", "model", "") if name in names]
    plain = [name for name in names if not averaged(name)]
    for candidates in (usual[:1], plain, names):
        if len(candidates) == 1:
            return candidates[0]
    raise InputError(f"{path} holds {_shown(names)}: choose one of them by `part`")


def _shown(parts: Iterable[str]) -> str:
    return listed([part or 'the outermost ("")' for part in parts])


def _is_tensor(value: Any) -> bool:
    # A nested tensor of PyTorch's has no shape.
    return hasattr(value, "ndim") and not getattr(value, "is_nested", False)
