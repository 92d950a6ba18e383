"""Anyone's PNG and JPEG files, made into images such as a network was trained on.

Fashion-MNIST's authors made theirs from photographs on a white ground: trimmed, longer side to 28
pixels, centred, inverted, in 8 bits of grey (Xiao et al., 2017, section 2). Other people's photos
get the same; what is dark outside already is only scaled.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from resnet_flax.errors import InputError, one_line

FORMATS = ("PNG", "JPEG")
LARGEST = 50_000_000  # pixels; 200 MB with colours and transparency
MIDDLE = 127
FAINT = 0.1  # what differs less from a light background is none of the thing

Box = tuple[float, float, float, float]  # left, upper, right, lower
MOST_NAMED = 5


class Photo(NamedTuple):
    """An image ready for a network.

    Attributes:
        pixels: uint8, (H, W, C).
        inverted: whether it had a bright background and was inverted.
    """

    pixels: np.ndarray
    inverted: bool


def read_photos(
    paths: Sequence[str | os.PathLike[str]], shape: tuple[int, int, int], dark_background: bool
) -> list[Photo]:
    """Reads image files of any size, mode and depth.

    Args:
        paths: PNG or JPEG files.
        shape: (H, W, C) wanted, C being 1 for grey or 3 for colours.
        dark_background: invert grey images with a bright border.

    Raises:
        InputError: when any of them cannot be read; it names them.
    """
    photos, faults = [], []
    for path in paths:
        try:
            photos.append(_fit(_open(Path(path)), shape, dark_background))
        except Exception as error:  # Pillow raises errors of many kinds on damaged files
            faults.append(f"{printable(path)} ({_reason(error)})")
    if faults:
        more = f" and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        count = f"{len(faults)} of {len(paths)} images: " if len(paths) > 1 else ""
        raise InputError(f"cannot read {count}{', '.join(faults[:MOST_NAMED])}{more}")
    return photos


def bright_border(images: np.ndarray) -> bool:
    """Whether images, uint8 (..., H, W, C), are bright at the border and in the corners.

    Both shares of bright pixels together are at most 0.68 in each of Fashion-MNIST's 70,000 images,
    and at least 1.32 in each of their negatives.
    """
    corners = images[..., [0, 0, -1, -1], [0, -1, 0, -1], :]
    return bool((_border(images) > MIDDLE).mean() + (corners > MIDDLE).mean() > 1)


def printable(path: str | os.PathLike[str]) -> str:
    """A file's name, with what would break a line or steer a terminal as escapes."""
    name = os.fspath(path)
    return name if name.isprintable() else ascii(name)


def _open(path: Path) -> Image.Image:
    """Decodes a file, upright, after a look at its size."""
    if not path.is_file():  # reading a pipe would wait for ever
        raise InputError("not a file" if path.exists() else "no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own limit is higher than this one
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > LARGEST:
                raise InputError(f"{width}x{height} pixels, more than {LARGEST:,}")
            image.load()
            return ImageOps.exif_transpose(image)


def _fit(image: Image.Image, shape: tuple[int, int, int], dark_background: bool) -> Photo:
    """Scales an image into the shape, centred, without changing its proportions."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off instead of scaling them
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
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
    """The part of an image in a box, as large as fits into the shape, opaque, in its channels."""
    height, width, channels = shape
    part = (box[2] - box[0], box[3] - box[1])
    scale = min(width / part[0], height / part[1])
    # Not padded before it is small: a line of a million pixels would become a huge square.
    size = (max(1, round(part[0] * scale)), max(1, round(part[1] * scale)))
    mode = "L" if channels == 1 else "RGB"
    image = image.convert("RGBA" if image.has_transparency_data else mode)
    small = _opaque(image.resize(size, Image.Resampling.BILINEAR, box)).convert(mode)
    return np.asarray(small).reshape(*size[::-1], channels)


def _trimmed(thing: np.ndarray, size: tuple[int, int]) -> Box:
    """Where in an image of that size the thing is, (H, W, 1) being a small map of it."""
    rows, columns = (np.flatnonzero(thing.any((axis, 2))) for axis in (1, 0))
    if not len(rows):
        return (0, 0, *size)
    x, y = size[0] / thing.shape[1], size[1] / thing.shape[0]
    return (columns[0] * x, rows[0] * y, (columns[-1] + 1) * x, (rows[-1] + 1) * y)


def _opaque(image: Image.Image) -> Image.Image:
    """Puts what is transparent on the ground, black or white, that the thing stands out from."""
    if image.mode != "RGBA":
        return image
    alpha = np.asarray(image.getchannel("A"), float)
    brightness = np.asarray(image.convert("L")) * alpha
    ground = "black" if brightness.sum() > MIDDLE * alpha.sum() else "white"
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image)


def _border(images: np.ndarray) -> np.ndarray:
    """The values of the first and last rows and columns."""
    edges = (images[..., 0, :, :], images[..., -1, :, :], images[..., 0, :], images[..., -1, :])
    return np.concatenate([edge.ravel() for edge in edges])


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a {' or '.join(FORMATS)} image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {LARGEST:,} pixels"
    return (getattr(error, "strerror", None) or one_line(error))[:200]
