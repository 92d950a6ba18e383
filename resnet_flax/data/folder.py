"""A folder of images by class, ``FOLDER/CLASS/*.png``, as uint8 arrays of one square size.

The folder may come from anywhere: no link in it is followed out of it, and an image's size is known
before it is decoded.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from resnet_flax.errors import InputError, one_line

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
SPLITS = ("train", "test")
LONGEST_NAME = 100  # letters of a class
MOST_NAMED = 3  # files in a message


class ImageFiles(NamedTuple):
    """What a folder holds.

    Attributes:
        paths: one for each image.
        labels: int32, (N,), each the index of its class.
        classes: the names of the folders, sorted.
        num_train: how many of them, at the beginning, are from ``train``; None without that folder.
    """

    paths: list[Path]
    labels: np.ndarray
    classes: tuple[str, ...]
    num_train: int | None


def find_images(folder: Path, report: Callable[[str], None]) -> ImageFiles:
    """Finds ``folder/CLASS/*.png`` (or .jpg, .jpeg), or the same in ``train`` and ``test``.

    Args:
        folder: what is hidden in it (``.name``) is passed over.
        report: told of files that are no images.

    Raises:
        InputError: when it is no such folder, a class is empty, there are fewer than two, ``train``
            and ``test`` differ in them, or a link leads out of the folder.
    """
    try:
        home = folder.resolve(strict=True)
        present = [name for name in SPLITS if (folder / name).is_dir()]
        if len(present) == 1:
            missing = next(name for name in SPLITS if name not in present)
            raise InputError(
                f"{folder} holds {present[0]} but no {missing}: add that folder, or name "
                f"{folder / present[0]} to have it split"
            )
        roots = [_inside(home, folder / name) for name in present] or [folder]
        found = [_find_classes(home, root, report) for root in roots]
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"cannot read the images in {folder}: {reason}") from error
    classes = tuple(found[0])
    for each, other in ((0, -1), (-1, 0)):
        if lacking := sorted(found[each].keys() - found[other].keys()):
            raise InputError(f"{roots[other]} lacks a folder {lacking[0]}, which {roots[each]} has")
    if len(classes) < 2:
        raise InputError(f"{roots[0]} holds one class only, {classes[0]}: two at least are needed")
    counts = [[len(root[name]) for name in classes] for root in found]
    return ImageFiles(
        paths=[path for root in found for name in classes for path in root[name]],
        labels=np.tile(np.arange(len(classes), dtype=np.int32), len(found)).repeat(
            np.ravel(counts)
        ),
        classes=classes,
        num_train=sum(counts[0]) if present else None,
    )


def read_images(paths: Sequence[Path], largest: int) -> np.ndarray:
    """Reads PNG and JPEG files of any size, mode and depth; transparency is ignored.

    Images that all are squares of one size, at most the largest, stay as they are. All others
    become squares of the largest size: Pillow resizes the shorter side (bilinear), and the longer
    one, which keeps its proportion, is cut equally at both ends.

    Args:
        paths: the files.
        largest: height and width, in pixels.

    Returns:
        uint8, (N, side, side, C), C being 1 if all images are grey and 3 otherwise.

    Raises:
        InputError: when an image cannot be read, or memory is too small for all; names the files.
    """
    with _quiet_pillow(), ThreadPoolExecutor() as pool:
        sizes: list[tuple[int, int]] = [(0, 0)] * len(paths)

        def look(index: int) -> None:
            with _open(paths[index]) as image:
                sizes[index] = image.size

        _call_for_all(pool, look, paths)
        width, height = sizes[0]
        kept = len(set(sizes)) == 1 and width == height <= largest
        images = empty_images(len(paths), width if kept else largest)

        def decode(index: int) -> None:
            with _open(paths[index]) as image:
                images[index] = as_square(ImageOps.exif_transpose(image), images.shape[1])

        _call_for_all(pool, decode, paths)
    return without_grey_channels(images)


def empty_images(count: int, side: int) -> np.ndarray:
    """An array for images, uint8, (count, side, side, 3).

    Raises:
        InputError: when it would not fit into this machine's memory.
    """
    needed = count * side * side * 3
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:  # NumPy would be given it, and the process killed when it is filled
        raise InputError(
            f"{count:,} images of {side}x{side} pixels take {needed / 1e9:.0f} GB, more than the "
            f"{memory / 1e9:.0f} GB of this machine: choose a smaller --image-size"
        )
    return np.empty((count, side, side, 3), np.uint8)


def as_square(image: Image.Image, side: int) -> np.ndarray:
    """Resizes an image's shorter side, and cuts out the middle: uint8, (side, side, 3)."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))


def without_grey_channels(images: np.ndarray) -> np.ndarray:
    """Keeps one of three channels if they are the same in all images (N, H, W, 3)."""
    grey = all((image == image[..., :1]).all() for image in images)
    return np.ascontiguousarray(images[..., :1]) if grey else images


def _find_classes(home: Path, root: Path, report: Callable[[str], None]) -> dict[str, list[Path]]:
    """Class -> its images, both sorted by name."""
    folders = [path for path in _visible(root) if _inside(home, path).is_dir()]
    if not folders:
        raise InputError(f"{root} holds no folders: it needs one for each class, CLASS/*.png")
    classes, others = {}, []
    for folder in folders:
        entries = [_inside(home, path) for path in _visible(folder)]
        images = [path for path in entries if path.suffix.lower() in FORMATS and path.is_file()]
        others += sorted({*entries} - {*images})
        name = folder.name
        if not (name.isprintable() and len(name) <= LONGEST_NAME):
            raise InputError(f"rename the folder {name!a} in {root}: it is a class's name")
        if not images:
            nested = any(path.is_dir() for path in entries)
            hint = f"; to use the folders in it as classes, name {folder}" if nested else ""
            raise InputError(f"no image in {folder} ({', '.join(FORMATS)}){hint}")
        classes[name] = images
    if others:
        report(f"{root}: left out, being no images ({', '.join(FORMATS)}): {_listed(others)}")
    return classes


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _inside(home: Path, path: Path) -> Path:
    """Returns the path.

    Raises:
        InputError: when it is a link out of the folder.
    """
    if path.is_symlink() and not path.resolve(strict=True).is_relative_to(home):
        raise InputError(f"{path} is a link out of the folder: put a copy in its place")
    return path


def _open(path: Path) -> Image.Image:
    return Image.open(path, formats=tuple({*FORMATS.values()}))


def _call_for_all(
    pool: ThreadPoolExecutor, read: Callable[[int], None], paths: Sequence[Path]
) -> None:
    """Calls it for each index.

    Raises:
        InputError: naming the paths for which it failed.
    """

    def attempt(index: int) -> str | None:
        try:
            read(index)
        except Exception as error:  # Pillow raises errors of many kinds on damaged files
            return f"{paths[index]} ({_reason(error)})"
        return None

    if faults := [fault for fault in pool.map(attempt, range(len(paths))) if fault]:
        raise InputError(f"cannot read {_listed(faults)}: mend or remove what is broken")


def _reason(error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG or JPEG image"
    return (getattr(error, "strerror", None) or one_line(error))[:200]


def _listed(things: Sequence[object]) -> str:
    more = f" and {len(things) - MOST_NAMED} more" if len(things) > MOST_NAMED else ""
    return ", ".join(map(str, things[:MOST_NAMED])) + more


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow refuses huge images instead of warning, and keeps other warnings to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
