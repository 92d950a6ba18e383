"""`fit`: from any position on, what follows is what the undisturbed run does, to the bit."""

import signal
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_flax.errors import TrainingError
from resnet_flax.machine.interruption import Interrupted, Interruption
from resnet_flax.training import feed, loop
from resnet_flax.training.compilation import compile_programs
from resnet_flax.training.loop import fit, train_epoch
from resnet_flax.training.position import Position
from resnet_flax.training.progress import Progress
from resnet_flax.training.recipes import RECIPES, build_optimizer
from tests.support.small_run import IMAGE_SIZE, Steps, new_job, new_state, random_data

EPOCHS, BATCH_SIZE, BATCHES = 2, 8, 3
# Momentum and an average of the parameters, so that all a state can hold is in it.
FAST = RECIPES["fast"]
SIZE = {"image_size": IMAGE_SIZE}
FAST_JOB = {
    "step_options": SIZE | FAST.step_options(),
    "eval_options": SIZE | {"flip": FAST.flip_test},
}
DATA = random_data(20)
OPTIMIZER = build_optimizer(FAST, 0.05, EPOCHS * BATCHES)


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """All runs share their compiled steps."""
    with pytest.MonkeyPatch.context() as patch:
        compiled = []

        def compile_once(*arguments, **options):
            if not compiled:
                compiled.append(compile_programs(*arguments, **options))
            return compiled[0]

        patch.setattr(loop, "compile_programs", compile_once)
        yield


class Run(SimpleNamespace):
    """What `fit` saved, how it ended."""


def run(state=None, position=None, *, stop_at=None, save=None, **changes) -> Run:
    """Trains; a signal comes when this many things were reported or saved."""
    job = new_job(DATA, BATCH_SIZE, epochs=EPOCHS, **FAST_JOB, **changes)
    state = state or new_state(DATA, OPTIMIZER, average=True)
    interruption, events = Interruption(), 0
    found = Run(saved=[], error=None)

    def event() -> None:
        nonlocal events
        events += 1
        if events == stop_at:
            interruption.requested = signal.SIGTERM

    class Reporter(Progress):
        def epoch(self, *arguments):  # type: ignore[no-untyped-def]
            event()
            return super().epoch(*arguments)

    def keep(state, position) -> None:
        event()
        found.saved.append((jax.tree.map(jnp.copy, state), position))

    try:
        found.state, found.position = fit(
            job,
            state,
            position or Position(),
            progress=Reporter(EPOCHS, 8),
            save=save or keep,
            epoch_ended=save or keep,
            interruption=interruption,
        )
    except Interrupted as stop:
        found.error = stop
    return found


def figures(position: Position) -> list:
    """What does not depend on the clock."""
    rows = [(row.epoch, row.loss, row.train_acc, row.test_acc) for row in position.results]
    sums = [float(value) for value in jax.tree.leaves(position.metrics)]
    return [rows, position.steps, sums]


@pytest.fixture(scope="module")
def undisturbed() -> Run:
    return run()


def check_same_end(found: Run, undisturbed: Run) -> None:
    assert figures(found.position) == figures(undisturbed.position)
    leaves = (jax.tree.leaves(each.state) for each in (found, undisturbed))
    chex.assert_trees_all_equal(*leaves)


def test_each_epoch_is_saved(undisturbed):
    assert [(p.epoch, p.steps) for _, p in undisturbed.saved] == [(2, 0), (3, 0)]
    assert [row.epoch for row in undisturbed.position.results] == [1, 2]


def test_it_goes_on_from_every_step(undisturbed):
    often = run(seconds_between_checkpoints=0.0)
    positions = [(p.epoch, p.steps) for _, p in often.saved]
    assert positions == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]
    check_same_end(often, undisturbed)
    for state, position in often.saved:
        check_same_end(run(state, position), undisturbed)


@pytest.mark.parametrize("stop_at", range(1, 11))
def test_it_stops_when_asked_and_what_it_saved_goes_on(stop_at, undisturbed):
    stopped = run(seconds_between_checkpoints=0.0, stop_at=stop_at)
    if stop_at < 10:  # after the last evaluation there is nothing to stop
        assert stopped.error.signum == signal.SIGTERM
    state, position = stopped.saved[-1]
    check_same_end(run(state, position), undisturbed)


def test_a_loss_that_is_not_a_number_is_never_saved():
    state = new_state(DATA, OPTIMIZER, average=True)
    broken = state.replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1, step 1"):
        run(broken, seconds_between_checkpoints=0.0, save=refuse)


def refuse(state, position) -> None:
    pytest.fail("saved")


def test_a_finished_run_is_left_alone(undisturbed):
    again = run(undisturbed.state, undisturbed.position)
    assert again.saved == []
    check_same_end(again, undisturbed)


def test_an_accelerator_gets_several_steps_at_once(monkeypatch):
    batches = [np.arange(8) + row for row in range(5)] + [np.arange(3)]

    def stacks(start=0):
        found = feed.stack_batches(batches[start:], 8)
        steps = [batch for stack, count in found for batch in stack[:count]]
        assert all(map(np.array_equal, steps, batches[start:]))
        assert len(steps) == len(batches[start:])
        return [(stack.shape, count) for stack, count in found]

    assert stacks() == [((1, 8), 1)] * 5 + [((1, 3), 1)]
    monkeypatch.setattr(feed, "STEPS_AT_ONCE", {"cpu": 2})
    assert stacks() == [((2, 8), 2), ((2, 8), 2), ((2, 8), 1), ((1, 3), 1)]
    assert stacks(3) == [((2, 8), 2), ((1, 3), 1)]
    assert stacks(5) == [((1, 3), 1)]
    monkeypatch.setattr(feed, "STEPS_AT_ONCE", {"cpu": 6})
    assert stacks() == [((6, 8), 5), ((1, 3), 1)]


def test_an_epoch_on_an_accelerator_is_the_same_epoch(monkeypatch):
    monkeypatch.setattr(loop, "compile_programs", compile_programs)
    ends = []
    for steps_at_once in (1, 4):
        monkeypatch.setattr(feed, "STEPS_AT_ONCE", {"cpu": steps_at_once})
        ends.append(run(new_state(DATA, optax.sgd(1e-4), average=True)))
    states = [end.state.variables for end in ends]
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-5)
    rows = [[row[:4] for row in end.position.results] for end in ends]
    np.testing.assert_allclose(*rows, rtol=1e-4)


def test_what_a_step_waits_for_the_compiler_is_not_training():
    def seconds(wait):
        return train_epoch(
            new_job(DATA, 8),
            new_state(DATA, optax.sgd(1e-4)),
            Position([]),
            Steps(wait),
            on_step=lambda *_: None,
            save=lambda *_: None,
            interruption=Interruption(),
        )[1].training_seconds

    assert seconds(0.0) - seconds(1000.0) == pytest.approx(3000.0, abs=100)  # of three calls
