"""Images that stay on the disk, and are decoded where an array of them is indexed."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from PIL import Image

from resnet_flax.data.image_files import (
    CROPS_TRIED,
    Resizing,
    listed,
    look_at,
    resized_crop,
    squared,
)
from resnet_flax.errors import InputError

CHANNELS = 3  # whether all images are grey is not known before all are decoded


class Store(Protocol):
    """Where images are: files, or records. It is sent to other processes."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, Path | bytes]:
        """An image's name, and its file or content."""
        ...


@dataclass(frozen=True)
class FileStore:
    """Image files.

    Attributes:
        folder: that they are in.
        names: of bytes, (N,), the paths in it: a million of them take 40 MB.
    """

    folder: Path
    names: np.ndarray

    @classmethod
    def of(cls, folder: Path, paths: Sequence[Path]) -> Self:
        """The files of a folder."""
        prefix = len(os.fsencode(folder / "x")) - 1  # `relative_to` takes seconds for a million
        return cls(folder, np.array([os.fsencode(path)[prefix:] for path in paths]))

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[str, Path]:
        """As `Store`."""
        path = self.folder / os.fsdecode(self.names[index])
        return str(path), path


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Looks like an array of images, uint8 (N, side, side, 3), and decodes what is asked for.

    Attributes:
        store: all images.
        which: the indices in it of these, (N,).
        side: pixels.
        resizing: how they are made square; by default the shorter side is resized, and the middle
            of the longer one kept.
        draft: whether large JPEGs are decoded at a half, a quarter or an eighth for random crops.
        skip_broken: whether an image that cannot be read is black, and noted, instead of an error.
        broken: positions of those that were black.
    """

    store: Store
    which: np.ndarray
    side: int
    resizing: Resizing | None = None
    draft: bool = False
    skip_broken: bool = False
    broken: set[int] = field(default_factory=set)

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __len__(self) -> int:
        return len(self.which)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the array."""
        return (len(self), self.side, self.side, CHANNELS)

    def select(self, which: slice | np.ndarray) -> "LazyImages":
        """Some of the images, still on the disk."""
        return replace(self, which=self.which[which], broken=set())

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        """Decodes images by their positions, as evaluation sees them; uint8 (n, side, side, 3).

        Raises:
            InputError: when one cannot be read; it names them.
        """
        positions = np.arange(len(self))[which]

        def attempt(position: int) -> np.ndarray | InputError:
            try:
                return self.decode(position)
            except InputError as error:
                if not self.skip_broken:
                    return error
            self.broken.add(int(position))
            return np.zeros(self.shape[1:], np.uint8)

        # Pillow warns of odd files.
        with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
            results = list(pool.map(attempt, positions))
        if faults := [each for each in results if isinstance(each, InputError)]:
            raise InputError(f"cannot read {listed(faults)}: mend or remove what is broken")
        return np.array(results, np.uint8).reshape(-1, *self.shape[1:])

    def decode(self, position: int) -> np.ndarray:
        """An image as evaluation sees it: uint8, (side, side, 3).

        Raises:
            InputError: when it cannot be read; it names it.
        """
        return self._look(position, lambda image: squared(image, self.side, self.resizing))

    def decode_randomly(
        self, position: int, smallest: float, *, seed: int, epoch: int
    ) -> np.ndarray:
        """A random crop of an image, which seed, epoch and image alone decide.

        It is as of `resnet_flax.data.image_files.resized_crop`. Raises `InputError` when the image
        cannot be read.
        """
        # The order of the epoch's images, of the same key, counts in the first of the four words.
        counter = np.array([0, 1 + self.which[position], 0, 0], np.uint64)
        random = np.random.Philox(counter=counter, key=np.array([seed, epoch], np.uint64))
        draws = (random.random_raw(4 * CROPS_TRIED) >> np.uint64(11)) * 2.0**-53
        interpolation = self.resizing.interpolation if self.resizing else "bilinear"
        return self._look(
            position,
            lambda image: resized_crop(
                image, draws.tolist(), smallest, self.side, interpolation, self.draft
            ),
        )

    def _look(self, position: int, look: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
        return look_at(*self.store.read(int(self.which[position])), look)
