"""Batches of images from the disk, decoded in worker processes, by Grain.

Seed, epoch and step alone decide what is in a batch, whoever decodes it.
"""

import gc
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, parent_process, resource_tracker
from typing import Any, NamedTuple

import numpy as np

from resnet_flax.data.dataset import Dataset, shuffled_batches
from resnet_flax.data.lazy_images import LazyImages
from resnet_flax.errors import InputError, one_line

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 1  # that each worker keeps ready, beside the one it works on
TAKEN_INSTEAD = 100  # images that are tried in the place of a broken one
RESTARTS = 1  # of the workers, after one has died
MOST_WORKERS = 16  # each takes 200 MB and more


class Batch(NamedTuple):
    """A part of a batch."""

    images: np.ndarray  # uint8, (B, side, side, C)
    labels: np.ndarray  # int32, (B,)
    weights: np.ndarray  # float32, (B,): 0 for padding, and for what evaluation cannot read
    broken: tuple[str, ...]  # files that cannot be read, and why


@dataclass(frozen=True, eq=False)
class BatchStream:
    """The batches of a run, training and evaluation of one epoch after the other, by their number.

    Attributes:
        train_set: of `LazyImages`, in a random order in each epoch.
        test_set: of `LazyImages`, in its own order; the last batch is filled up with its last one.
        epochs: how many.
        batch_size: in training.
        test_batch_size: in evaluation.
        seed: of order and crops.
        random_resized_crop: least share of a training image's area in a random crop; 0 for none.
        rows: the number of images in a batch -> those of them that this process reads.
    """

    train_set: Dataset
    test_set: Dataset
    epochs: int
    batch_size: int
    test_batch_size: int
    seed: int
    random_resized_crop: float
    rows: Mapping[int, np.ndarray]

    @property
    def train_steps(self) -> int:
        """Batches of an epoch's training."""
        return -(-len(self.train_set) // self.batch_size)

    @property
    def test_steps(self) -> int:
        """Batches of an evaluation."""
        return -(-len(self.test_set) // self.test_batch_size)

    def number(self, epoch: int, step: int) -> int:
        """Of the batch of that epoch, from 1, after so many steps in it."""
        return (epoch - 1) * (self.train_steps + self.test_steps) + step

    def __len__(self) -> int:
        return self.number(self.epochs + 1, 0)

    def __getitem__(self, number: int) -> Batch:
        """Decodes this process's part of a batch."""
        epoch, step = divmod(number, self.train_steps + self.test_steps)
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of odd files
            if step < self.train_steps:
                return self._train_batch(epoch + 1, step)
            return self._test_batch(step - self.train_steps)

    def read(self, start: int, workers: int) -> Iterator[Batch]:
        """Yields the batches from a number on, decoded in worker processes, or in this one if 0.

        The end of the iterator's life is that of the workers. When one of them dies, all are
        started again, once.

        Raises:
            InputError: when a worker dies a second time.
        """
        restarts = 0
        while True:
            batches = _prefetched(self, start, workers)
            try:
                with _without_signals():  # what reads the first batch starts the processes
                    batch = _copied(next(batches, None))
                while batch:
                    start += 1
                    yield batch
                    batch = _copied(next(batches, None))
                return
            except RuntimeError as error:
                if restarts == RESTARTS:
                    raise InputError(
                        f"the processes that read the images do not last: {one_line(error):.200} "
                        "(-9: too little memory; -7: too little in /dev/shm, Docker's --shm-size; "
                        'a script that trains needs `if __name__ == "__main__":`)'
                    ) from error
                restarts += 1
                logger.warning("restarting the processes that read the images: %s", error)
            finally:
                batches.close()
                gc.collect()  # Grain's threads leave circles behind that hold shared memory

    def _train_batch(self, epoch: int, step: int) -> Batch:
        batches = _shuffled(len(self.train_set), self.batch_size, self.seed, epoch)
        positions = batches[step][self.rows[len(batches[step])]]
        images, taken, broken = [], [], []
        for position in positions:
            # What is taken instead is the same for any number of processes.
            for candidate in range(position, position + TAKEN_INSTEAD):
                candidate %= len(self.train_set)
                try:
                    images.append(self._train_image(candidate, epoch))
                    taken.append(candidate)
                    break
                except InputError as error:
                    broken.append(str(error))
            else:
                images.append(np.zeros(self._lazy(self.train_set).shape[1:], np.uint8))
                taken.append(position)
        weights = np.ones(len(positions), np.float32)
        return Batch(np.array(images), self.train_set.labels[taken], weights, tuple(broken))

    def _train_image(self, position: int, epoch: int) -> np.ndarray:
        images = self._lazy(self.train_set)
        if not self.random_resized_crop:
            return images.decode(position)
        return images.decode_randomly(
            position, self.random_resized_crop, seed=self.seed, epoch=epoch
        )

    def _test_batch(self, step: int) -> Batch:
        images, count = self._lazy(self.test_set), len(self.test_set)
        rows = step * self.test_batch_size + self.rows[self.test_batch_size]
        pixels = np.zeros((len(rows), *images.shape[1:]), np.uint8)
        weights = (rows < count).astype(np.float32)
        broken = []
        for index in np.flatnonzero(weights):
            try:
                pixels[index] = images.decode(rows[index])
            except InputError as error:
                broken.append(str(error))
                weights[index] = 0
        labels = self.test_set.labels[np.minimum(rows, count - 1)]
        return Batch(pixels, labels, weights, tuple(broken))

    def _lazy(self, data: Dataset) -> LazyImages:
        assert isinstance(data.images, LazyImages)
        return data.images


def default_workers() -> int:
    """As many processes as this one has cores, within reason."""
    everywhere = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if everywhere else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@lru_cache(2)
def _shuffled(num_examples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    return shuffled_batches(num_examples, batch_size, seed=seed, epoch=epoch)


def _copied(batch: Batch | None) -> Batch | None:
    """Out of the workers' shared memory, which must not outlive them in anybody's frame."""
    if batch is None:
        return None
    images, labels, weights = map(np.array, batch[:3])
    return Batch(images, labels, weights, batch.broken)


def _prefetched(stream: BatchStream, start: int, workers: int) -> Any:
    import grain  # it takes two seconds, and only streams need it
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain asks for some
        flags.FLAGS.mark_as_parsed()
    remaining = grain.MapDataset.source(stream).slice(slice(start, None))
    # Grain would read 500 batches ahead.
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=BATCHES_AHEAD)
    batches = remaining.to_iter_dataset(one).mp_prefetch(options, worker_init_fn=_begin_worker)
    return iter(batches)


@contextmanager
def _without_signals() -> Iterator[None]:
    """Threads and processes that are started get none: they are for the one that starts them.

    A handler in the workers would come too late, after the seconds of their imports.
    """
    resource_tracker.ensure_running()  # it lets the signals through again, when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(index: int, count: int) -> None:
    """A worker ends with the process that started it."""
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
