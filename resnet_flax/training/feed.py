"""Where a run's batches come from: a set that is on the devices, or a stream from the disk."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from resnet_flax.errors import InputError
from resnet_flax.machine.devices import (
    batch_sharding,
    replicate,
    replicated,
    split_batch,
    split_rows,
)
from resnet_flax.training.step import (
    Images,
    eval_by_index,
    eval_step,
    evaluation_batches,
    train_step,
    train_steps,
    whole_share,
)

logger = logging.getLogger(__name__)

# An accelerator gets several steps at once, so that it need not wait for the host; a CPU loses its
# quick convolutions by that.
STEPS_AT_ONCE = {"cpu": 1}
STEPS_AT_ONCE_ON_ACCELERATORS = 8
OF_EACH_IMAGE = (jnp.int32, jnp.float32)  # its label, and its weight in evaluation
PLACED_AHEAD = 2  # batches of a stream on the devices, before they are needed


class Call(NamedTuple):
    """What a program is called with, after the state and the sums."""

    shape: tuple[int, ...]  # of the batches: the program's name
    steps: int
    arguments: tuple[Any, ...]


class Feed(Protocol):
    """What the loop asks for batches.

    Attributes:
        sizes: of an epoch's batches, in images.
        train_step: what is done with a training batch, of state, sums, and a call's arguments.
        eval_step: the same in evaluation.
        waited: seconds in which the devices had nothing to do, for want of images.
    """

    sizes: list[int]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    waited: float

    def train(self, epoch: int, done: int, sums: Callable[[], Any]) -> Iterator[Call]:
        """Yields an epoch's calls, after so many steps; ``sums`` tells those of the last call.

        Raises:
            InputError: when images cannot be read.
        """
        ...

    def test(self) -> Iterator[tuple[Any, ...]]:
        """Yields the arguments of the evaluation, batch by batch; raises as `train`."""
        ...

    def train_arguments(self, done: int) -> dict[tuple[int, ...], tuple[Any, ...]]:
        """The programs that training needs, the first to be used first, and their arguments."""
        ...

    def test_arguments(self) -> tuple[Any, ...]:
        """Those of the evaluation's program."""
        ...

    def close(self) -> None:
        """Ends what reads ahead."""
        ...


class ResidentFeed:
    """Batches of sets that are whole on every device: what is sent there are indices.

    Args:
        train_set: on the devices.
        test_set: on the devices.
        batches: epoch -> that epoch's index arrays, int32.
        mesh: the devices.
    """

    train_step = staticmethod(train_steps)
    eval_step = staticmethod(eval_by_index)
    waited = 0.0

    def __init__(
        self,
        train_set: Images,
        test_set: Images,
        batches: Callable[[int], list[np.ndarray]],
        mesh: Mesh,
    ) -> None:
        self._train_set, self._test_set = train_set, test_set
        self._batches, self._mesh = batches, mesh
        self.sizes = [len(indices) for indices in batches(1)]

    def train(self, epoch: int, done: int, sums: Callable[[], Any]) -> Iterator[Call]:
        """Yields the set, and the indices of several batches."""
        for stack, steps in stack_batches(self._batches(epoch)[done:], self.sizes[0]):
            batch = split_batch(stack, self._mesh)
            count = replicate(np.int32(steps), self._mesh)
            yield Call(stack.shape, steps, (self._train_set, batch, count))

    def test(self) -> Iterator[tuple[Any, ...]]:
        """Yields the set, the indices of a batch, and their weights."""
        return evaluation_batches(self._test_set, self.sizes[0], self._mesh)

    def train_arguments(self, done: int) -> dict[tuple[int, ...], tuple[Any, ...]]:
        """A program for each number of images, of any number of steps."""
        batches, size = self._batches(1), self.sizes[0]
        stacks = stack_batches(batches[done:], size) + stack_batches(batches, size)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self._mesh))
        return {
            stack.shape: (self._train_set, self._indices(stack.shape), count) for stack, _ in stacks
        }

    def test_arguments(self) -> tuple[Any, ...]:
        """Of batches that the devices can share."""
        share = (whole_share(self.sizes[0], self._mesh),)
        return self._test_set, self._indices(share), self._indices(share, jnp.float32)

    def close(self) -> None:
        """Nothing reads ahead."""

    def _indices(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(shape, self._mesh))


class StreamedFeed:
    """Batches that others decode, placed on the devices while these compute.

    Args:
        read: the number of a batch -> it and all that follow, training and evaluation of an epoch
            after those of the one before; each has ``images``, ``labels`` and ``weights``, the rows
            that are this process's (`resnet_flax.machine.devices.local_rows`), and ``broken``, what
            could not be read.
        sizes: of an epoch's training batches, in images.
        test_steps: batches of an evaluation, each as large as the devices can share.
        image_shape: (H, W, C).
        mesh: the devices.
        skip_broken: whether to go on without what cannot be read.
    """

    train_step = staticmethod(train_step)
    eval_step = staticmethod(eval_step)

    def __init__(
        self,
        read: Callable[[int], Iterator[Any]],
        sizes: list[int],
        test_steps: int,
        image_shape: tuple[int, int, int],
        mesh: Mesh,
        skip_broken: bool = False,
    ) -> None:
        self.sizes = sizes
        self.waited = 0.0
        self._read, self._image_shape, self._mesh = read, image_shape, mesh
        self._test_size = whole_share(sizes[0], mesh)
        self._all_sizes = [*sizes, *[self._test_size] * test_steps]
        self._skip_broken = skip_broken
        self._broken: set[str] = set()
        self._reader = ThreadPoolExecutor(1)
        self._batches: Iterator[Any] | None = None
        self._ahead: deque[Future[Any]] = deque()
        self._next = 0  # batch to be read

    def train(self, epoch: int, done: int, sums: Callable[[], Any]) -> Iterator[Call]:
        """Yields images and labels of one batch."""
        if self._batches is None:
            self._next = (epoch - 1) * len(self._all_sizes) + done
            self._batches = self._read(self._next)
        for size in self.sizes[done:]:
            images, labels, _ = self._take(sums)
            yield Call((size,), 1, (images, labels))

    def test(self) -> Iterator[tuple[Any, ...]]:
        """Yields images, labels and weights of one batch."""
        for _ in self._all_sizes[len(self.sizes) :]:
            yield self._take(lambda: ())

    def train_arguments(self, done: int) -> dict[tuple[int, ...], tuple[Any, ...]]:
        """A program for each number of images."""
        sizes = [*self.sizes[done:], *self.sizes]
        return {(size,): self._arguments(size)[:2] for size in sizes}

    def test_arguments(self) -> tuple[Any, ...]:
        """Of batches that the devices can share."""
        return self._arguments(self._test_size)

    def close(self) -> None:
        """Ends the reader, and whoever decodes for it."""
        self._reader.shutdown(cancel_futures=True)
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]

    def _arguments(self, size: int) -> tuple[Any, ...]:
        sharding = batch_sharding((size,), self._mesh)
        kinds = (
            ((size, *self._image_shape), jnp.uint8),
            ((size,), jnp.int32),
            ((size,), jnp.float32),
        )
        return tuple(jax.ShapeDtypeStruct(*kind, sharding=sharding) for kind in kinds)

    def _take(self, sums: Callable[[], Any]) -> tuple[Any, ...]:
        while len(self._ahead) < PLACED_AHEAD:
            self._ahead.append(self._reader.submit(self._place))
        batch = self._ahead.popleft()
        if not batch.done():
            jax.block_until_ready(sums())  # from here on the devices wait too
            started = time.perf_counter()
            wait([batch])
            self.waited += time.perf_counter() - started
        *placed, broken = batch.result()
        if broken and not self._skip_broken:
            mend = "mend or remove what is broken, or pass over it by `skip_broken`"
            raise InputError(f"cannot read {', '.join(broken[:3])}: {mend}")
        for each in set(broken) - self._broken:
            self._broken.add(each)
            logger.warning("passed over %s: %d so far", each, len(self._broken))
        return tuple(placed)

    def _place(self) -> tuple[Any, ...]:
        """In the reader's thread: the next batch, on the devices."""
        assert self._batches is not None
        batch = next(self._batches, None)
        if batch is None:  # the run is at its end
            return ()
        size = self._all_sizes[self._next % len(self._all_sizes)]
        self._next += 1
        rows = (batch.images, batch.labels, batch.weights)
        return *(split_rows(each, size, self._mesh) for each in rows), batch.broken


def stack_batches(batches: list[np.ndarray], size: int) -> list[tuple[np.ndarray, int]]:
    """Puts steps that run in one call together, in the same order.

    Returns:
        (S, B) and how many of the S are batches. Few shapes need few programs: those of ``size``
        fill up one shape, and a last, smaller batch is alone.
    """
    most = STEPS_AT_ONCE.get(jax.default_backend(), STEPS_AT_ONCE_ON_ACCELERATORS)
    stacks = []
    while batches:
        together = [each for each in batches[:most] if len(each) == size] or batches[:1]
        rows = np.minimum(np.arange(most if len(together[0]) == size else 1), len(together) - 1)
        stacks.append((np.stack(together)[rows], len(together)))
        batches = batches[len(together) :]
    return stacks
