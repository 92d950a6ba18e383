"""`resnet_flax.data.dataset`: parts of a data set, and the order of batches."""

import numpy as np
import pytest

from resnet_flax.data import Dataset, shuffled_batches
from resnet_flax.data.dataset import stratified_split
from resnet_flax.errors import InputError


def test_take() -> None:
    dataset = Dataset(np.zeros((5, 28, 28, 1), np.uint8), np.arange(5, dtype=np.int32))
    assert dataset.take(None) is dataset
    assert len(dataset.take(5)) == 5
    first = dataset.take(2)
    assert (len(first), first.images.shape, first.labels.tolist()) == (2, (2, 28, 28, 1), [0, 1])


@pytest.mark.parametrize("count", [0, -1, 6])
def test_take_refuses_what_is_not_there(count: int) -> None:
    dataset = Dataset(np.zeros((5, 28, 28, 1), np.uint8), np.zeros(5, np.int32))
    with pytest.raises(InputError, match=f"first {count} of 5 examples"):
        dataset.take(count)


def test_what_is_held_out_is_the_end():
    dataset = Dataset(np.zeros((5, 28, 28, 1), np.uint8), np.arange(5, dtype=np.int32))
    first, last = dataset.hold_out(2)
    assert (first.labels.tolist(), last.labels.tolist()) == ([0, 1, 2], [3, 4])
    assert (first.images.shape, last.images.shape) == ((3, 28, 28, 1), (2, 28, 28, 1))
    for count in (0, 5):
        with pytest.raises(InputError, match=f"cannot hold out {count} of 5 examples"):
            dataset.hold_out(count)


@pytest.mark.parametrize(("count", "tested"), [(2, 1), (4, 1), (5, 1), (8, 2), (100, 20)])
def test_every_class_has_its_share(count, tested):
    labels = np.repeat(np.arange(3), count)
    train, test = stratified_split(labels, ("a", "b", "c"), seed=0)
    assert sorted([*train, *test]) == list(range(3 * count))
    assert np.bincount(labels[test]).tolist() == [tested] * 3


# --- Batches.


@pytest.mark.parity
def test_batches_hold_every_index_once_and_the_last_is_kept() -> None:
    batches = shuffled_batches(1_000, 256, seed=0, epoch=0)
    assert [batch.shape for batch in batches] == [(256,), (256,), (256,), (232,)]
    assert all(batch.dtype == np.int32 for batch in batches)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(1_000))


def test_batches_of_a_divisor_or_more_than_all() -> None:
    assert [len(batch) for batch in shuffled_batches(512, 256, seed=0, epoch=0)] == [256, 256]
    assert [len(batch) for batch in shuffled_batches(5, 256, seed=0, epoch=0)] == [5]


def test_samples_are_shuffled_anew_by_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(np.concatenate(shuffled_batches(60, 8, seed=seed, epoch=epoch)).tolist())

    assert order(0, 0) == order(0, 0)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_never_changes() -> None:
    (batch,) = shuffled_batches(8, 8, seed=1, epoch=2)
    assert batch.tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    first = shuffled_batches(60_000, 256, seed=0, epoch=0)[0]
    assert first[:5].tolist() == [47848, 34552, 24994, 32827, 31943]
    assert shuffled_batches(3, 3, seed=2**64 - 1, epoch=0)[0].tolist() == [0, 2, 1]
