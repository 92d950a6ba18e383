"""A stream's batches: trained on as a set in memory is, from any position on, and what breaks."""

import time
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.data import shuffled_batches
from resnet_flax.errors import TrainingError
from resnet_flax.machine.devices import data_mesh
from resnet_flax.machine.interruption import Interruption
from resnet_flax.training.feed import StreamedFeed
from resnet_flax.training.loop import fit
from resnet_flax.training.position import Position
from resnet_flax.training.progress import Progress
from tests.support.small_run import SGD, new_job, new_state, random_data

EPOCHS, BATCH_SIZE, SIZES, TEST_STEPS = 2, 8, [8, 8, 4], 3
DATA = random_data(20)
IMAGES, LABELS = map(np.asarray, DATA)


class Disk:
    """What a stream reads; it knows where it was asked to begin."""

    def __init__(self, broken: int | None = None, seconds: float = 0.0) -> None:
        self.broken, self.seconds = broken, seconds
        self.starts, self.closed = [], 0

    def read(self, start: int):
        self.starts.append(start)
        try:
            for number in range(start, EPOCHS * 6):
                time.sleep(self.seconds)
                yield self.batch(number)
        finally:
            self.closed += 1

    def batch(self, number: int) -> SimpleNamespace:
        epoch, step = divmod(number, 6)
        if step < 3:
            rows = shuffled_batches(20, BATCH_SIZE, seed=0, epoch=epoch + 1)[step]
            weights = np.ones(len(rows), np.float32)
        else:
            rows = (step - 3) * 8 + np.arange(8)
            weights = (rows < 20).astype(np.float32)
            rows = np.minimum(rows, 19)
        broken = ("cats/1.jpg (truncated)",) if number == self.broken else ()
        return SimpleNamespace(
            images=IMAGES[rows], labels=LABELS[rows], weights=weights, broken=broken
        )


def run(disk=None, state=None, position=None, *, skip_broken=False, progress=None, **changes):
    """Trains; returns what was reached, and what was saved on the way."""
    mesh, saved = data_mesh(), []
    disk = disk or Disk()
    feed = StreamedFeed(disk.read, SIZES, TEST_STEPS, (8, 8, 1), mesh, skip_broken)
    job = new_job(DATA, BATCH_SIZE, epochs=EPOCHS, **{"feed": feed} | changes)

    def keep(state, position) -> None:
        saved.append((jax.tree.map(jnp.copy, state), position))

    error = None
    try:
        state, position = fit(
            job,
            state or new_state(DATA, SGD),
            position or Position(),
            progress=progress or Progress(EPOCHS, 8),
            save=keep,
            epoch_ended=keep,
            interruption=Interruption(),
        )
    except TrainingError as stopped:
        error = str(stopped)
    return SimpleNamespace(
        state=state, position=position, saved=saved, error=error, disk=disk, feed=job.feed
    )


def figures(found):
    return [(row.epoch, row.loss, row.train_acc, row.test_acc) for row in found.position.results]


@pytest.fixture(scope="module")
def undisturbed():
    return run()


def test_it_trains_as_a_set_in_memory_does(undisturbed):
    resident = run(feed=new_job(DATA, BATCH_SIZE).feed)
    chex.assert_trees_all_close(undisturbed.state.params, resident.state.params, rtol=1e-5)
    np.testing.assert_allclose(figures(undisturbed), figures(resident), rtol=1e-5)
    assert resident.feed.waited == 0


def test_it_reads_from_where_the_run_is_and_goes_on_to_the_bit(undisturbed):
    often = run(seconds_between_checkpoints=0.0)
    assert often.disk.closed == 1
    for state, position in often.saved[:-1]:
        found = run(state=state, position=position)
        assert found.disk.starts == [6 * (position.epoch - 1) + position.steps]
        assert figures(found) == figures(undisturbed)
        chex.assert_trees_all_equal(found.state, undisturbed.state)


@pytest.mark.parametrize(("broken", "place"), [(1, (1, 1)), (4, (1, 3)), (6, (2, 0))])
def test_what_is_broken_stops_the_run_with_what_was_reached_saved(broken, place, undisturbed):
    found = run(Disk(broken=broken))
    assert found.error.startswith("cannot read cats/1.jpg (truncated): mend or remove")
    assert "`skip_broken`" in found.error
    assert found.error.endswith("what was saved goes on with `resume`")
    assert found.disk.closed == 1
    state, position = found.saved[-1]
    assert (position.epoch, position.steps) == place
    chex.assert_trees_all_equal(run(state=state, position=position).state, undisturbed.state)


def test_what_is_broken_is_passed_over_when_asked_and_named_once(undisturbed, caplog):
    found = run(Disk(broken=7), skip_broken=True)
    assert figures(found) == figures(undisturbed)
    assert caplog.text.count("passed over cats/1.jpg (truncated): 1 so far") == 1


def test_waiting_for_images_is_measured_and_told(caplog, undisturbed):
    found = run(Disk(seconds=0.2))
    assert 0.3 < found.feed.waited < 5
    assert caplog.text.count("the input is the bottleneck: the devices waited for images ") == 1
    assert undisturbed.feed.waited < found.feed.waited
