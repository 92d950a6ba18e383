"""Labelled images: the parts to train and to test on, and the order of batches."""

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from resnet_flax.data.image_files import Resizing
from resnet_flax.data.lazy_images import LazyImages
from resnet_flax.errors import InputError

logger = logging.getLogger(__name__)

TEST_SHARE = 0.2  # of each class, where the data have no test set of their own


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images."""

    # An array, uint8, (N, height, width, channels), such as (60000, 28, 28, 1), or `LazyImages`.
    images: Any
    labels: np.ndarray  # int32, (N,), each the index of its class

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, which: slice | np.ndarray) -> "Dataset":
        """Returns some of the examples, by a slice or by their indices."""
        images = self.images
        chosen = images.select(which) if isinstance(images, LazyImages) else images[which]
        return Dataset(chosen, self.labels[which])

    def take(self, count: int | None) -> "Dataset":
        """Returns the first `count` examples, or all of them if `count` is None."""
        if count is None:
            return self
        if not 1 <= count <= len(self):
            raise InputError(f"cannot take the first {count} of {len(self)} examples")
        return self.select(slice(count))

    def hold_out(self, count: int) -> "tuple[Dataset, Dataset]":
        """Returns the first examples and the last `count`, for choices made while training."""
        if not 1 <= count < len(self):
            raise InputError(f"cannot hold out {count} of {len(self)} examples")
        return self.select(slice(-count)), self.select(slice(-count, None))


class Splits(NamedTuple):
    """A data set to train and to test on, both in an order that mixes the classes."""

    train: Dataset
    test: Dataset
    classes: tuple[str, ...]  # their names, in the order of the labels
    fit: str = "crop"  # how other pictures are made one of these, as of `data.image_files`
    resizing: Resizing | None = None  # how they were made square instead


def stratified_split(
    labels: np.ndarray, classes: tuple[str, ...], seed: int, name: str = "the data set"
) -> tuple[np.ndarray, np.ndarray]:
    """The indices to train on and to test on, 80 to 20 within each class, in random orders.

    Raises:
        InputError: when a class has one example only.
    """
    logger.info(
        f"{name} has no test set of its own: {TEST_SHARE:.0%} of each class, drawn with seed "
        f"{seed}, are kept out of training for it"
    )
    order = shuffle(np.arange(len(labels)), seed)
    tested = np.zeros(len(labels), bool)
    for label, class_name in enumerate(classes):
        members = order[labels[order] == label]
        if len(members) < 2:
            raise InputError(
                f"the class {class_name} has {len(members)} image, too few to train and to test on"
            )
        tested[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    return order[~tested[order]], order[tested[order]]


def shuffle(indices: np.ndarray, seed: int) -> np.ndarray:
    """The indices in another order, the same on every machine."""
    (order,) = shuffled_batches(len(indices), len(indices), seed=seed, epoch=0)
    return indices[order]


def shuffled_batches(
    num_examples: int, batch_size: int, *, seed: int, epoch: int
) -> list[np.ndarray]:
    """One epoch's batches: every index once, in an order set by seed and epoch alone.

    They are int32, of shape (batch_size,); the last may be smaller. The seed is 0 to 2**64 - 1.
    """
    # The raw stream of a bit generator never changes between NumPy versions; what
    # `Generator.permutation` makes of it may.
    random = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = np.argsort(random.random_raw(num_examples), kind="stable").astype(np.int32)
    return np.split(order, range(batch_size, num_examples, batch_size))
