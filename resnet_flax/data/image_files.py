"""Anyone's PNG and JPEG files as pixels: one road, for training and for predicting.

``"crop"``: the shorter side is resized, and the middle of the longer one kept, as in training.
``"pad"``: all of it on black, as Fashion-MNIST's authors made of photographs on a white ground:
trimmed, longer side to 28 pixels, centred, inverted, in 8 bits of grey (Xiao et al., 2017, section
2). What is dark outside already is only scaled.

A pretrained network's own rule, a `Resizing`, takes the place of both.
"""

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps, ImageStat, UnidentifiedImageError

from resnet_flax.errors import InputError, reason
from resnet_flax.machine.memory import machine_memory

logger = logging.getLogger(__name__)

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG"}
FITS = ("crop", "pad")
LARGEST = 89_478_485  # pixels, from which on Pillow warns; 360 MB with colours and transparency
INTERPOLATIONS = tuple(method.name.lower() for method in sorted(Image.Resampling))  # by number
PNG = b"\x89PNG\r\n\x1a\n"  # how one begins
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # the chunks that decide them
MIDDLE = 127
FAINT = 0.1  # what differs less from a light background is none of the thing
CROPS_TRIED = 10
MOST_NAMED = 3  # files in a message
TURNS: dict[object, Image.Transpose] = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = [*TURNS.values()][3:]  # those that swap width and height

AnyPath = str | os.PathLike[str]
Box = tuple[float, float, float, float]  # left, upper, right, lower
T = TypeVar("T")


class Resizing(NamedTuple):
    """How images were made square for a network, to the pixel: resized, then cropped.

    Attributes:
        side: pixels, at least the image size; the shorter side is resized to it, and the image's
            middle is cropped.
        squash: both sides are resized to it instead.
        interpolation: one of `INTERPOLATIONS`, Pillow's.
        rounds_down: where an odd number of pixels is cropped: half of it is rounded down
            (transformers), and not to the nearest even number (torchvision, timm).
    """

    side: int
    squash: bool = False
    interpolation: str = "bilinear"
    rounds_down: bool = False


class Photo(NamedTuple):
    """An image ready for a network."""

    pixels: np.ndarray  # uint8, (H, W, C)
    inverted: bool  # whether it had a bright background and was inverted


def read_photos(
    paths: Sequence[AnyPath],
    shape: tuple[int, int, int],
    *,
    fit: str,
    dark_background: bool,
    resizing: Resizing | None = None,
) -> list[Photo]:
    """Reads PNG and JPEG files of any size, mode and depth, to predict from.

    The shape is (H, W, C), C being 1 for grey or 3 for colours, ``fit`` one of `FITS`, which a
    ``resizing`` replaces. With ``dark_background``, a grey image that is padded is inverted if its
    border is bright.

    Raises:
        InputError: when any of them cannot be read; it names them.
    """

    def look(_: int, image: Image.Image) -> Photo:
        mode = "L" if shape[-1] == 1 else "RGB"
        if resizing:
            return Photo(resized(image, shape[0], resizing, mode).reshape(shape), inverted=False)
        if fit == "pad":
            return _padded(_plain(image).convert(mode), shape, dark_background)
        return Photo(cropped(image, shape[1::-1], mode).reshape(shape), inverted=False)

    return _all_read(_attempts(paths, look))


def read_images(
    paths: Sequence[AnyPath],
    largest: int,
    resizing: Resizing | None = None,
    skip_broken: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads PNG and JPEG files of any size, mode and depth, to train on.

    Images that all are squares of one size, at most ``largest`` pixels, stay as they are. All
    others are resized (bilinear) and cropped to squares of that size. With a ``resizing``, all
    follow it.

    Returns:
        uint8, (N, side, side, C), C being 1 if all images are grey, and 3 otherwise or with a
        ``resizing``; and which of the paths they are, (N,): all, unless ``skip_broken`` leaves
        out what cannot be read, of which the log tells.

    Raises:
        InputError: when an image cannot be read, or memory is too small for all; names the files.
    """
    sizes = _attempts(paths, lambda _, image: image.size)
    known = [size for size in sizes if not isinstance(size, InputError)]
    width, height = known[0] if known else (largest, largest)
    kept = len(set(known)) == 1 and width == height <= largest and not resizing
    images = empty_images(len(paths), width if kept else largest)

    def decode(number: int, image: Image.Image) -> None:
        images[number] = squared(image, images.shape[1], resizing)

    results = _attempts(paths, decode)
    read = np.array([not isinstance(each, InputError) for each in results])
    if skip_broken and read.any():
        if faults := [each for each in results if isinstance(each, InputError)]:
            logger.warning(f"passed over {len(faults)} of {len(paths)} images: {listed(faults)}")
        images = images if read.all() else images[read]
    else:
        _all_read(results, ": mend or remove what is broken")
    return images if resizing else without_grey_channels(images), np.flatnonzero(read)


def empty_images(count: int, side: int) -> np.ndarray:
    """An array for images, uint8, (count, side, side, 3), if it fits into this machine's memory."""
    needed = count * side * side * 3
    memory = machine_memory()
    if needed > memory:  # NumPy would be given it, and the process killed when it is filled
        raise InputError(
            f"{count:,} images of {side}x{side} pixels take {needed / 1e9:.0f} GB, more than the "
            f"{memory / 1e9:.0f} GB of this machine: stream them (`stream`), or choose a smaller "
            "`image_size`"
        )
    return np.empty((count, side, side, 3), np.uint8)


def squared(image: Image.Image, side: int, resizing: Resizing | None) -> np.ndarray:
    """An image as a square, uint8, (side, side, 3): by a rule, or `cropped`."""
    return resized(image, side, resizing) if resizing else cropped(image, (side, side))


def cropped(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> np.ndarray:
    """The middle of an image, of (width, height): uint8, (height, width, 3), without 3 in "L"."""
    image = _coloured(image)  # before it is resized, though it may end in grey
    return np.asarray(ImageOps.fit(image, size, Image.Resampling.BILINEAR).convert(mode))


def resized(image: Image.Image, size: int, resizing: Resizing, mode: str = "RGB") -> np.ndarray:
    """The middle of an image: uint8, (size, size, 3), without 3 in "L".

    Raises:
        InputError: when the image is so long that, resized, it would not fit into memory.
    """
    image = _coloured(image)
    side, shorter = resizing.side, min(image.size)
    new = (side, side)
    if not resizing.squash:
        new = (side * image.width // shorter, side * image.height // shorter)
    if new[0] * new[1] > LARGEST:
        raise InputError(f"{image.width}x{image.height} pixels: too long and thin")
    image = image.resize(new, Image.Resampling[resizing.interpolation.upper()])
    margins = [(n - size) / 2 for n in new]
    left, top = (int(n) if resizing.rounds_down else round(n) for n in margins)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert(mode))


def resized_crop(
    image: Image.Image,
    draws: Sequence[float],
    smallest: float,
    size: int,
    interpolation: str = "bilinear",
    draft: bool = False,
) -> np.ndarray:
    """A random part of an image, made square, as torchvision's RandomResizedCrop makes it.

    Args:
        image: of any mode.
        draws: random numbers in [0, 1), as many as `random_box` takes.
        smallest: its share of the area.
        size: pixels.
        interpolation: one of `INTERPOLATIONS`.
        draft: decode a JPEG at a half, a quarter or an eighth, if the part has pixels enough then.

    Returns:
        uint8, (size, size, 3).
    """
    box, scale = (0, 0, 0, 0), 1.0
    if draft and image.format == "JPEG":
        width, height = image.size
        box = random_box(
            (height, width) if _turn(image) in TURNED else (width, height), draws, smallest
        )
        enough = size / min(box[2] - box[0], box[3] - box[1])
        shrunk = image.draft(image.mode, (math.ceil(width * enough), math.ceil(height * enough)))
        scale = shrunk[1][2] / width if shrunk else scale
    image = _coloured(image)
    method = Image.Resampling[interpolation.upper()]
    if scale == 1:
        part = image.crop(random_box(image.size, draws, smallest))
        return np.asarray(part.resize((size, size), method))
    left, top, right, bottom = (scale * n for n in box)
    return np.asarray(image.resize((size, size), method, (left, top, right, bottom)))


def random_box(
    size: tuple[int, int], draws: Sequence[float], smallest: float
) -> tuple[int, int, int, int]:
    """A box in an image of (width, height), distributed as torchvision's RandomResizedCrop has it.

    It has a share of the area that is uniform between the ``smallest`` and 1, and sides whose
    ratio's logarithm is uniform between those of 3/4 and 4/3 (Szegedy et al., 2015,
    arXiv:1409.4842). Both are drawn anew while the box does not fit; after `CROPS_TRIED` times it
    is the largest in the middle.
    """
    width, height = size
    for attempt in range(CROPS_TRIED):
        share, ratio, left, top = draws[4 * attempt : 4 * attempt + 4]
        area = width * height * (smallest + (1 - smallest) * share)
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def without_grey_channels(images: np.ndarray) -> np.ndarray:
    """Keeps one of three channels if they are the same in all images (N, H, W, 3)."""
    grey = all((image == image[..., :1]).all() for image in images)
    return np.ascontiguousarray(images[..., :1]) if grey else images


def bright_border(images: np.ndarray) -> bool:
    """Whether images, uint8 (..., H, W, C), are bright at the border and in the corners."""
    # The two shares of bright pixels sum up to at most 0.68 in each of Fashion-MNIST's 70,000
    # images, and to at least 1.32 in each of their negatives.
    corners = images[..., [0, 0, -1, -1], [0, -1, 0, -1], :]
    return bool((_border(images) > MIDDLE).mean() + (corners > MIDDLE).mean() > 1)


def printable(path: AnyPath) -> str:
    """A file's name, with what would break a line or steer a terminal as escapes."""
    name = os.fspath(path)
    return name if name.isprintable() else ascii(name)


def listed(things: Sequence[object]) -> str:
    """The first few of them in a line, and how many more there are."""
    more = f" and {len(things) - MOST_NAMED} more" if len(things) > MOST_NAMED else ""
    return ", ".join(printable(str(thing)) for thing in things[:MOST_NAMED]) + more


def look_at(name: str, file: Path | bytes, look: Callable[[Image.Image], T]) -> T:
    """Opens an image, from a file or its content, and returns what a function makes of it.

    Raises:
        InputError: when it cannot be read, with its name and why.
    """
    try:
        if isinstance(file, Path) and not file.is_file():  # reading a pipe would wait for ever
            raise InputError("not a file" if file.exists() else "no such file")
        with _opened(file) as image:
            width, height = image.size
            if width * height > LARGEST:
                raise InputError(f"{width}x{height} pixels, more than {LARGEST:,}")
            return look(image)
    except UnidentifiedImageError:
        why = "not a PNG or JPEG image"
    except Image.DecompressionBombError:  # of twice as many
        why = f"more than {LARGEST:,} pixels"
    except Exception as error:  # Pillow raises errors of many kinds on damaged files
        why = reason(error)
    raise InputError(f"{printable(name)} ({why})")


def _attempts(
    paths: Sequence[AnyPath], look: Callable[[int, Image.Image], T]
) -> list[T | InputError]:
    """What a function makes of the number and the image of each file, or why it could not."""

    def attempt(number: int) -> T | InputError:
        path = paths[number]
        try:
            return look_at(os.fspath(path), Path(path), lambda image: look(number, image))
        except InputError as error:
            return error

    # Pillow warns of odd files.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        return list(pool.map(attempt, range(len(paths))))


def _all_read(results: Sequence[T | InputError], mend: str = "") -> list[T]:
    if faults := [each for each in results if isinstance(each, InputError)]:
        count = f"{len(faults)} of {len(results)} images: " if len(results) > 1 else ""
        raise InputError(f"cannot read {count}{listed(faults)}{mend}")
    return [each for each in results if not isinstance(each, InputError)]


def _opened(file: Path | bytes) -> Image.Image:
    """The image in a file; of a PNG that Pillow refuses, without its metadata."""
    formats = tuple({*FORMATS.values()})
    try:
        return Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=formats)
    except (UnidentifiedImageError, ValueError):  # a profile too large for Pillow, a wrong checksum
        content = file.read_bytes() if isinstance(file, Path) else file
        if not content.startswith(PNG):
            raise
        chunks, place = [PNG], len(PNG)
        while place < len(content):
            end = place + 12 + int.from_bytes(content[place : place + 4], "big")
            if content[place + 4 : place + 8] in PIXELS:
                chunks.append(content[place:end])
            place = end
        return Image.open(io.BytesIO(b"".join(chunks)), formats=formats)


def _plain(image: Image.Image) -> Image.Image:
    """An image upright, 8 bits deep and opaque, on whichever of black and white it stands out."""
    image = _upright(image)
    if image.mode.startswith("I"):  # 16 bits: the upper 8, as Pillow takes of colours
        values, clear = np.asarray(image), image.info.get("transparency")  # one level, in a PNG
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.uint8(values != clear) * np.uint8(255)))
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    shown = ImageChops.multiply(image.convert("L"), alpha)  # / 255
    bright = ImageStat.Stat(shown).sum[0] * 255 > MIDDLE * ImageStat.Stat(alpha).sum[0]
    ground = Image.new("RGBA", image.size, "black" if bright else "white")
    return Image.alpha_composite(ground, image).convert("RGB")


def _coloured(image: Image.Image) -> Image.Image:
    image = _plain(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _upright(image: Image.Image) -> Image.Image:
    """An image as it is meant to be seen; as it lies, if its metadata are damaged."""
    image.load()  # a damaged picture stays an error
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    # Pillow's exif_transpose also rewrites the metadata, and fails on entries of the wrong type.
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of many kinds
        return None


def _padded(image: Image.Image, shape: tuple[int, int, int], dark_background: bool) -> Photo:
    pixels = _scaled(image, shape, (0, 0, *image.size))
    inverted = shape[-1] == 1 and dark_background and bright_border(pixels)
    if inverted:
        border = _border(pixels)
        ground = np.median(border[border > MIDDLE])  # becomes black, even if it was not quite white
        if image.size != (shape[1], shape[0]):  # a photo, not one of the data set's negatives
            pixels = _scaled(image, shape, _trimmed(pixels < ground * (1 - FAINT), image.size))
        pixels = (np.clip(ground - pixels, 0, None) * (255 / ground) + 0.5).astype(np.uint8)
    canvas = np.zeros(shape, np.uint8)
    top, left = ((whole - part) // 2 for whole, part in zip(shape, pixels.shape[:2], strict=False))
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return Photo(canvas, inverted)


def _scaled(image: Image.Image, shape: tuple[int, int, int], box: Box) -> np.ndarray:
    """The part of an image in a box, as large as fits into the shape."""
    height, width, channels = shape
    part = (box[2] - box[0], box[3] - box[1])
    scale = min(width / part[0], height / part[1])
    # Padded only when it is small: a line of a million pixels would become a huge square.
    size = (max(1, round(part[0] * scale)), max(1, round(part[1] * scale)))
    small = image.resize(size, Image.Resampling.BILINEAR, box)
    return np.asarray(small).reshape(*size[::-1], channels)


def _trimmed(thing: np.ndarray, size: tuple[int, int]) -> Box:
    """Where in an image of that size the thing is, (H, W, 1) being a small map of it."""
    box = Image.fromarray(thing[..., 0]).getbbox()
    if box is None:
        return (0, 0, *size)
    x, y = size[0] / thing.shape[1], size[1] / thing.shape[0]
    return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def _border(images: np.ndarray) -> np.ndarray:
    edges = (images[..., 0, :, :], images[..., -1, :, :], images[..., 0, :], images[..., -1, :])
    return np.concatenate([edge.ravel() for edge in edges])
