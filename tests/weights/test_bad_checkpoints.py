"""Generated bad checkpoints: each is read, or refused in one line of at most 1,000 letters."""

import io
import json
import pickle
import warnings
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from resnet_flax import from_torch
from resnet_flax.errors import InputError
from resnet_flax.weights import convert, guess_model, load_safetensors, read_checkpoint, start_from
from tests.support.state_dicts import SMALL, SMALL_STATE_DICT

Draw = np.random.Generator
TENSORS = {key: torch.from_numpy(value) for key, value in SMALL_STATE_DICT.items()}
KEYS = [*TENSORS]
OBJECTS = [
    Namespace(lr=0.1),
    PurePosixPath("data"),
    Fraction(1, 3),
    np.float64(0.5),
    np.ones(3),
    torch.nn.ReLU(),
    ValueError("\x1b[1mbold\n"),
    print,
    {1, 2},
    Counter("aab"),
    torch.device("cpu"),
    torch.Size([1]),
    2 + 3j,
    b"bytes",
    None,
    "text\nof two lines",
    [[1], [2, 3]],
    10**400,
]
ODD_KEYS = [
    "",
    ".",
    "..",
    "a" * 5000,
    "module.",
    "\x1b[2J",
    "two\nlines",
    "重量",
    "\ud800",
    3,
    None,
]
ODD_KEYS += [(1, 2), b"conv1.weight", True, "conv1.weight.", ".".join("a" * 500)]


def as_torch(content: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def odd_tensor(draw: Draw) -> Any:
    """A tensor that is no array of the right numbers."""
    whole = TENSORS[pick(draw, KEYS)]
    kinds: list[Callable[[], Any]] = [
        lambda: whole.to(pick(draw, [torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])),
        lambda: whole[None],
        lambda: whole.flatten()[:0],
        lambda: torch.zeros(()),
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: whole.float().to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nn.Parameter(whole.float()),
        lambda: torch.full_like(whole.float(), float("nan")),
        lambda: torch.zeros((1,) * 30),
    ]
    with warnings.catch_warnings(action="ignore"):  # PyTorch plans to drop some
        return pick(draw, kinds)()


def pick(draw: Draw, things: Any) -> Any:
    return things[draw.integers(len(things))]


def state_dict(draw: Draw) -> dict[Any, Any]:
    """One with a few things wrong in it, or nothing."""
    tensors: dict[Any, Any] = dict(TENSORS)
    for _ in range(draw.integers(4)):
        change = draw.integers(7)
        key = pick(draw, KEYS)
        if change == 0:
            tensors.pop(key, None)
        elif change == 1:
            tensors[pick(draw, ODD_KEYS)] = tensors.pop(key, None)
        elif change == 2:
            tensors[key] = odd_tensor(draw)
        elif change == 3:
            tensors[key] = pick(draw, OBJECTS)
        elif change == 4:
            tensors[pick(draw, ODD_KEYS)] = pick(draw, OBJECTS)
        elif change == 5:
            prefix = pick(draw, ["module.", "model.", "a.b.c.", "."])
            tensors = {f"{prefix}{name}": value for name, value in tensors.items()}
        else:
            tensors = OrderedDict(reversed(tensors.items()))
    return tensors


def nested(draw: Draw) -> Any:
    """State dicts within mappings and lists, beside other things."""
    content: Any = state_dict(draw)
    for _ in range(draw.integers(1, 4)):
        name = pick(draw, ["state_dict", "model", "net", "ema", "optimizer", *ODD_KEYS])
        outer: Any = {name: content, "epoch": 3}
        if draw.random() < 0.3:
            outer[pick(draw, ["state_dict_ema", "args", "loss", 0])] = pick(
                draw, [state_dict(draw), torch.ones(()), *OBJECTS]
            )
        if draw.random() < 0.1:
            outer["self"] = outer
        content = outer if draw.random() < 0.9 else [content]
    return content


def flipped(draw: Draw, content: bytes) -> bytes:
    """Some bits turned, most of them where the names and shapes are."""
    damaged = bytearray(content)
    for _ in range(draw.integers(1, 9)):
        reach = len(content) if draw.random() < 0.3 else min(len(content), 3000)
        place = int(draw.integers(reach))
        if draw.random() < 0.3:  # the directory of a zip archive is at its end
            place = len(content) - 1 - place
        damaged[place] ^= 1 << int(draw.integers(8))
    return bytes(damaged)


def repickled(draw: Draw) -> bytes:
    """A PyTorch archive whose pickle is damaged, so that the archive itself is whole."""
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(as_torch(nested(draw)))) as old:
        with zipfile.ZipFile(archive, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, flipped(draw, data) if name.endswith("data.pkl") else data)
    return archive.getvalue()


def downloaded(draw: Draw) -> bytes:
    words = [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46827520\n",
        b"<!DOCTYPE html>\n<html><head><title>Sign in</title>",
        b"\r\n\r\n<html>",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        b"Entry not found",
        b'{"error":"Repository not found"}',
        b'{"weight_map": {"fc.weight": "absent.bin"}}',
        b'{"weight_map": {"fc.weight": "../../etc/passwd"}}',
        b'{"weight_map": {"fc.weight": "net.pth", "b": "net.safetensors"}}',
        b'{"weight_map": [1]}',
        b"{",
        b"[" * 100_000,
        b"\x1f\x8b\x08\0junk",
        b"\x89HDF\r\n\x1a\n" + bytes(600),
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"\x80",
        b"\x80\x02]\x94.",
        "\ufeffText".encode("utf-16"),
        bytes(1000),
    ]
    return pick(draw, words) + (draw.bytes(draw.integers(50)) if draw.random() < 0.3 else b"")


def listed_header(draw: Draw) -> bytes:
    """A safetensors file whose header says other things than its tensors."""
    entry = {
        "dtype": pick(draw, ["F32", "F64", "BF16", "F8_E4M3", "I8", "x", None, 3]),
        "shape": pick(draw, [[3], [-1], [2**63], [1.5], "3", None, [], [0]]),
        "data_offsets": pick(draw, [[0, 12], [12, 0], [0, 2**63], [-1, 11], [0], None]),
    }
    header: Any = {pick(draw, [*KEYS, "\x1b[1m", ""]): entry, "__metadata__": pick(draw, [{}, 3])}
    text = json.dumps(pick(draw, [header, entry, [header], 3])).encode()
    length = pick(draw, [len(text), len(text) + 1, 2**40, 0])
    return length.to_bytes(8, "little") + text + bytes(12)


def whole_safetensors(draw: Draw) -> bytes:
    arrays = {
        str(key).encode(errors="replace").decode(): value.numpy()
        for key, value in state_dict(draw).items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided
        if value.dtype in (torch.float32, torch.int64, torch.int8) and value.numel() < 10**6
        if not (value.is_nested or value.is_meta or value.requires_grad)
    }
    return save({key: np.ascontiguousarray(value) for key, value in arrays.items()})


def cut(draw: Draw, content: bytes) -> bytes:
    return content[: draw.integers(len(content))]


GENERATORS: list[Callable[[Draw], bytes]] = [
    lambda draw: as_torch(state_dict(draw)),
    lambda draw: as_torch(nested(draw)),
    lambda draw: as_torch(nested(draw), legacy=True),
    lambda draw: as_torch(pick(draw, OBJECTS), legacy=draw.random() < 0.5),
    lambda draw: pickle.dumps(pick(draw, OBJECTS), protocol=draw.integers(6)),
    lambda draw: cut(draw, as_torch(TENSORS, legacy=draw.random() < 0.5)),
    lambda draw: flipped(draw, as_torch(TENSORS, legacy=draw.random() < 0.5)),
    repickled,
    downloaded,
    listed_header,
    whole_safetensors,
    lambda draw: flipped(draw, whole_safetensors(draw)),
    lambda draw: cut(draw, whole_safetensors(draw)),
    lambda draw: draw.bytes(draw.integers(200)),
]


def check(number: int, folder: Path) -> str:
    """Reads the bad checkpoint of a number; says how that ended."""
    draw = np.random.default_rng(number)
    content = GENERATORS[number % len(GENERATORS)](draw)
    name = pick(draw, ["net.pth", "net.pth", "net.safetensors"])
    if number % len(GENERATORS) in (9, 10, 11, 12) and draw.random() < 0.8:
        name = "net.safetensors"
    path = folder / name
    path.write_bytes(content)
    before = sorted(folder.iterdir())
    ended = []

    def load() -> None:
        part = pick(draw, [None, None, None, "ema", "\n"])
        tensors = read_checkpoint(path, part)
        ended.append("read")
        guess_model("resnet18", tensors)
        from_torch(SMALL, tensors)
        convert(SMALL, tensors, "huggingface")
        ended.append("converted")

    def start() -> None:
        start_from(str(path), load_safetensors(path), SMALL, channels=3, seed=0)

    for attempt in (load, start):
        try:
            attempt()
        except InputError as error:
            line = str(error)
            assert line.isprintable(), line
            assert len(line) < 1000, line
            assert "weights_only to False" not in line
            assert "add_safe_globals" not in line
    assert sorted(folder.iterdir()) == before
    path.unlink()
    return ended[-1] if ended else "refused"


@pytest.mark.parametrize(
    "numbers",
    [range(56), pytest.param(range(56, 616), marks=pytest.mark.slow)],
    ids=["56", "560"],
)
def test_bad_checkpoints_are_read_or_refused_in_one_line(numbers: range, tmp_path: Path) -> None:
    ended = Counter(check(number, tmp_path) for number in numbers)
    assert sum(ended.values()) == len(numbers)
    assert min(ended[kind] for kind in ("refused", "read", "converted")) > 0, ended
    assert ended["refused"] > len(numbers) / 2, ended
