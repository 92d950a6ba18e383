"""Folders of small random images by class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


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
