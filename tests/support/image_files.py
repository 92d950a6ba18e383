"""Folders of small random images by class, and how they are read or refused."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data.folder import find_images
from resnet_flax.data.image_files import read_images
from resnet_flax.errors import InputError


def random_image(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """An image of (width, height)."""
    generator = np.random.default_rng(seed)
    shape = (*size[::-1], len(mode)) if len(mode) > 1 else size[::-1]
    return Image.fromarray(generator.integers(0, 256, shape, np.uint8))


def write_classes(
    root: Path,
    classes: Sequence[str] = ("cats", "dogs"),
    count: int = 5,
    size: tuple[int, int] = (8, 8),
    mode: str = "RGB",
) -> Path:
    """Writes ``root/CLASS/NUMBER.png``, no two images the same."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            image = random_image(1000 * label + number, size, mode)
            image.save(root / name / f"{number:02}.png")
    return root


def refused(folder: Path, largest: int = 8) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(InputError) as caught:
        read_images(find_images(folder).paths, largest)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 600
    return line


def assert_same_images(found: np.ndarray, expected: list[Image.Image]) -> None:
    """In whatever order."""
    arrays = [np.asarray(image).reshape(found.shape[1:]) for image in expected]
    assert sorted(each.tobytes() for each in found) == sorted(each.tobytes() for each in arrays)


def natural_image(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth and rough at once, as photographs are: of each octave, half of the one before."""
    layers = [random_image(9 * seed + n, (2 << n, 2 << n)).resize(size, 3) for n in range(8)]
    shares = 0.5 ** np.arange(8)
    mixed = np.tensordot(shares / shares.sum(), np.stack(layers).astype(np.float32), 1)
    return Image.fromarray(np.uint8(np.clip(1.6 * (mixed - 127.5) + 127.5, 0, 255)))


def write_photos(root: Path, count: int = 5, largest: int = 40, ending: str = "jpg") -> Path:
    """Writes ``root/CLASS/NUMBER``: two classes of coloured images, of all sizes from a half."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("cats", "dogs")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            width, height = random.integers(largest // 2, largest + 1, 2).tolist()
            photo = natural_image(count * label + number, (width, height))
            photo.save(root / name / f"{number:02}.{ending}")
    return root
