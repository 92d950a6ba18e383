"""Generated bad pictures and folders of them: each is read, or refused in one clear line."""

import io
import os
import shutil
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import load_dataset, read_photos
from resnet_flax.errors import InputError
from tests.support.image_files import random_image, write_classes

Draw = np.random.Generator
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"]
FORMATS = ["PNG", "PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
NAMES = ["a.png", "b.PNG", "c.jpg", "d.jpeg", ".e.png", "f.txt", "g", "重.png", "\x1b[2J.png"]
NAMES += ["two\nlines.png", "x" * 250 + ".png", os.fsdecode(b"\xff.png"), "Thumbs.db", "-.png"]
FOLDERS = ["cats", "dogs", "mice", "train", "test", "val", "__MACOSX", ".git", "重", "\x1b[2J"]
FOLDERS += ["two\nlines", "x" * 200, os.fsdecode(b"\xff"), "$RECYCLE.BIN", "cats.png", " "]


def pick(draw: Draw, things: Any) -> Any:
    return things[draw.integers(len(things))]


def image(draw: Draw) -> Image.Image:
    size = pick(draw, [(8, 8), (8, 8), (9, 5), (1, 1), (1, 300), (300, 2)])
    picture = random_image(int(draw.integers(1000)), size)
    mode = pick(draw, MODES)
    return (
        picture.convert("L").convert(mode) if mode in ("I;16", "I", "F") else picture.convert(mode)
    )


def encoded(draw: Draw) -> bytes:
    """A picture of any kind, in a format that takes it."""
    picture, kind, file = image(draw), pick(draw, FORMATS), io.BytesIO()
    more = {"exif": draw.bytes(draw.integers(40))} if draw.random() < 0.3 else {}
    try:
        picture.save(file, kind, **more)
    except (OSError, ValueError, KeyError, SyntaxError, DeprecationWarning):  # of Pillow 12, for I
        picture.convert("RGB").save(file, "PNG")
    return file.getvalue()


def chunked(draw: Draw) -> bytes:
    """A PNG of chunks with odd content, whose checksums are right."""
    header = struct.pack(
        ">IIBBBBB",
        *pick(draw, [(8, 8), (0, 8), (2**31, 1), (60_000, 60_000), (2**32 - 1, 2**32 - 1)]),
        pick(draw, [1, 8, 16, 7]),
        pick(draw, [0, 2, 3, 4, 6, 5]),
        *draw.integers(2, size=3).tolist(),
    )
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(draw.bytes(draw.integers(300))))]
    for _ in range(draw.integers(4)):
        names = [b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"PLTE", b"tRNS", b"pHYs", b"acTL"]
        place = int(draw.integers(1, 3))
        content = pick(draw, [draw.bytes(draw.integers(30)), b"a\0\0" + zlib.compress(bytes(9))])
        chunks.insert(place, (pick(draw, [*names, b"fcTL", b"gAMA"]), content))
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def flipped(draw: Draw, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.integers(1, 9)):
        damaged[draw.integers(len(damaged))] ^= 1 << int(draw.integers(8))
    return bytes(damaged)


def cut(draw: Draw, content: bytes) -> bytes:
    return content[: draw.integers(len(content))]


PICTURES: list[Callable[[Draw], bytes]] = [
    encoded,
    chunked,
    lambda draw: flipped(draw, encoded(draw)),
    lambda draw: cut(draw, encoded(draw)),
    lambda draw: draw.bytes(draw.integers(100)),
    lambda draw: pick(draw, [b"", b"<html>", b"version https://git-lfs", b"\x89PNG\r\n\x1a\n"]),
    lambda draw: encoded(draw) + draw.bytes(30),
]


def spoil(draw: Draw, root: Path, outside: Path) -> None:
    """Puts something into a folder, or takes something away."""
    folders = [path for path in root.rglob("*") if path.is_dir() and not path.is_symlink()]
    folder = pick(draw, [root, *sorted(folders)])
    name = pick(draw, [*NAMES, *FOLDERS])
    kind = draw.integers(8)
    if os.path.lexists(folder / name):  # a pipe, perhaps
        return
    if kind == 0 and folder != root:
        shutil.rmtree(folder)
    elif kind == 1:
        write_classes(folder, [name], count=int(draw.integers(3)))
    elif kind == 2:
        to = [outside, outside / "cats", outside / "cats/00.png", root, "..", name, "gone", "/"]
        (folder / name).symlink_to(pick(draw, to))
    elif kind == 3:
        os.mkfifo(folder / name)
    elif kind == 4:
        folder.rename(folder.with_name(pick(draw, FOLDERS)))
    elif kind == 5:
        shutil.copytree(outside, folder / name, symlinks=True)
    else:
        (folder / name).write_bytes(pick(draw, PICTURES)(draw))


def check(number: int, folder: Path) -> str:
    """Reads the bad folder of a number, to train on, and its pictures, to predict from."""
    draw = np.random.default_rng(number)
    outside = write_classes(folder / "outside", count=3)
    root = write_classes(folder / "root", count=3)
    if draw.random() < 0.3:
        parts = folder / "parts"
        parts.mkdir()
        for name in pick(draw, [("train", "test"), ("train", "val"), ("train",), ("test", "val")]):
            shutil.copytree(root, parts / name)
        root = parts
    for _ in range(draw.integers(1, 4)):
        try:
            spoil(draw, root, outside)
        except OSError:  # the system does not take that
            continue
    pictures = [pick(draw, PICTURES)(draw) for _ in range(2)]
    for place, content in enumerate(pictures):
        (folder / f"{place}.png").write_bytes(content)
    before = sorted(folder.rglob("*"))
    ended = Counter[str]()

    def attempt(what: str, read: Callable[[], Any]) -> None:
        try:
            read()
            ended[f"{what} read"] += 1
        except InputError as error:
            line = str(error)
            assert line.isprintable(), line
            assert len(line.replace(str(folder), "").replace("x" * 200, "")) < 800, line
            ended[f"{what} refused"] += 1

    for follow in (False, True):
        attempt(
            "folder",
            lambda: load_dataset(f"folder:{root}", image_size=8, follow_links=follow),  # noqa: B023
        )
    for place in range(len(pictures)):
        path = folder / f"{place}.png"
        shape, fit = pick(draw, [((28, 28, 1), "pad"), ((8, 8, 3), "crop"), ((8, 8, 1), "crop")])
        attempt(
            "picture",
            lambda: read_photos([path], shape, fit=fit, dark_background=True),  # noqa: B023
        )
    assert sorted(folder.rglob("*")) == before
    shutil.rmtree(folder)
    return " ".join(ended)


@pytest.mark.parametrize(
    "numbers",
    [range(60), pytest.param(range(60, 660), marks=pytest.mark.slow)],
    ids=["60", "600"],
)
def test_bad_folders_and_pictures_are_read_or_refused_in_one_line(numbers, tmp_path):
    with warnings.catch_warnings(action="error"):
        ended = Counter(
            word for number in numbers for word in check(number, tmp_path / "f").split(" ", -1)
        )
    assert {"folder", "picture", "read", "refused"} == ended.keys()
