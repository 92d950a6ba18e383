"""The loop over epochs and steps: where it may stop, and what it then leaves behind."""

import math
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_flax.errors import InputError, TrainingError
from resnet_flax.machine.devices import any_process, replicate, split_batch
from resnet_flax.machine.interruption import Interrupted, Interruption
from resnet_flax.training.compilation import EVALUATION, compile_programs
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.position import EpochResult, Position
from resnet_flax.training.progress import Progress
from resnet_flax.training.step import Images, TrainState, evaluate

Event = Callable[[TrainState, Position], None]
# An accelerator gets several steps at once, so that it need not wait for the host; a CPU loses its
# quick convolutions by that.
STEPS_AT_ONCE = {"cpu": 1}
STEPS_AT_ONCE_ON_ACCELERATORS = 8
# Several processes ask each other this often, in calls, whether to save or to stop.
CALLS_BETWEEN_AGREEMENTS = 8


class Job(NamedTuple):
    """What does not change during a run.

    Attributes:
        train_set: on the devices.
        test_set: on the devices.
        batches: epoch -> that epoch's index arrays, int32.
        epochs: the last epoch's number.
        step_options: of `resnet_flax.training.train_step`.
        eval_options: of `resnet_flax.training.eval_step`.
        mesh: the devices.
        seconds_between_checkpoints: in an epoch; its end is always kept.
    """

    train_set: Images
    test_set: Images
    batches: Callable[[int], list[np.ndarray]]
    epochs: int
    step_options: Mapping[str, Any]
    eval_options: Mapping[str, Any]
    mesh: Mesh
    seconds_between_checkpoints: float = math.inf


def fit(
    job: Job,
    state: TrainState,
    position: Position,
    *,
    progress: Progress,
    save: Event,
    epoch_ended: Event,
    interruption: Interruption,
) -> tuple[TrainState, Position]:
    """Trains and evaluates, epoch by epoch, from any position on.

    Args:
        job: data, batches, and how to train.
        state: donated.
        position: where the run is.
        progress: told of each step.
        save: called to keep what was reached within an epoch.
        epoch_ended: called to keep what was reached after an epoch and its evaluation.
        interruption: read after each step.

    Raises:
        TrainingError: when the loss is no longer finite; what was saved stays.
        Interrupted: when the run was asked to stop; what was reached is saved.
    """
    if position.epoch > job.epochs:
        return state, position
    batches = job.batches(1)
    sizes = [len(indices) for indices in batches]
    calls = stack_batches(batches[position.steps :], sizes[0]) + stack_batches(batches, sizes[0])
    with progress.compiling():
        programs = compile_programs(
            state,
            job.train_set,
            job.test_set,
            (stack.shape for stack, _ in calls),
            sizes[0],
            mesh=job.mesh,
            step_options=job.step_options,
            eval_options=job.eval_options,
            wanted=lambda: interruption.requested is None,
        )
    with interruption.deferred(), programs:
        while position.epoch <= job.epochs:
            with progress.epoch(position.epoch, sizes, position.steps) as on_step:
                state, position = train_epoch(
                    job, state, position, programs, on_step, save=save, interruption=interruption
                )
            started = time.perf_counter()
            tested = evaluate(
                state,
                job.test_set,
                batch_size=sizes[0],
                **job.eval_options,
                mesh=job.mesh,
                step=partial(programs, EVALUATION),
                before_batch=partial(stop_if_asked, state, position, save, interruption),
            )
            result = EpochResult(
                epoch=position.epoch,
                loss=position.metrics.loss,
                train_acc=position.metrics.accuracy,
                test_acc=tested.accuracy,
                examples_per_sec=sum(sizes) / position.training_seconds,
                seconds=position.training_seconds + time.perf_counter() - started,
            )
            position = Position([*position.results, result])
            epoch_ended(state, position)
            stop_if_asked(state, position, save, interruption)
    return state, position


def train_epoch(
    job: Job,
    state: TrainState,
    position: Position,
    programs: Callable[..., tuple[TrainState, Metrics]],
    on_step: Callable[[int, Metrics], None],
    *,
    save: Event,
    interruption: Interruption,
) -> tuple[TrainState, Position]:
    """The rest of an epoch's steps.

    ``programs`` is called with a stack's shape and what `resnet_flax.training.train_steps` takes,
    ``on_step`` with the number of finished steps and their sums; the rest is as in `fit`.
    """
    batches = job.batches(position.epoch)
    metrics = replicate(position.metrics, job.mesh)
    started = time.perf_counter() - position.training_seconds
    saved = time.perf_counter()

    def reached(steps: int) -> Position:
        check_finite(metrics, position.epoch, steps)
        seconds = time.perf_counter() - started
        return position.replace(steps=steps, metrics=metrics, training_seconds=seconds)

    done = position.steps
    for call, (stack, steps) in enumerate(stack_batches(batches[done:], len(batches[0]))):
        before = metrics
        batch = split_batch(stack, job.mesh)
        count = replicate(np.int32(steps), job.mesh)
        state, metrics = programs(stack.shape, state, metrics, job.train_set, batch, count)
        # Reading the sums before this call leaves the device busy, with one call in flight.
        check_finite(before, position.epoch, done)
        on_step(done, before)
        done += steps
        if jax.process_count() > 1 and call % CALLS_BETWEEN_AGREEMENTS:
            continue
        due = time.perf_counter() - saved > job.seconds_between_checkpoints
        if any_process(due or interruption.requested is not None):
            here = reached(done)  # waits for the steps under way, which count
            saving = time.perf_counter()
            stop_if_asked(state, here, save, interruption)
            save(state, here)
            saved = time.perf_counter()
            started += saved - saving  # the rate is that of the training alone
    position = reached(len(batches))
    on_step(len(batches), metrics)
    return state, position


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


def check_finite(metrics: Metrics, epoch: int, steps: int) -> None:
    """Waits for the sums, and raises `TrainingError` where the loss is infinite or no number."""
    if not math.isfinite(metrics.loss):
        raise TrainingError(
            f"the loss is {metrics.loss} in epoch {epoch}, step {steps}: "
            "try a smaller `learning_rate`"
        )


def stop_if_asked(
    state: TrainState, position: Position, save: Event, interruption: Interruption
) -> None:
    """Saves and raises `Interrupted`, if a signal came to any process."""
    signum = interruption.requested
    if any_process(signum is not None):
        save(state, position)
        done = f"epoch {position.epoch}, step {position.steps}"
        raise Interrupted(signum or signal.SIGTERM, f"{done} is saved")


def check_batches(batches: list[np.ndarray], image_size: int, total_stride: int) -> None:
    """Makes sure that the smallest batch can be normalised in the network's last stage.

    Raises:
        InputError: when that stage would hold a single value per channel.
    """
    if min(map(len, batches)) * math.ceil(image_size / total_stride) ** 2 < 2:
        raise InputError(
            f"the last batch would hold 1 image of {image_size}x{image_size} pixels, too few for "
            "batch normalisation: change `batch_size`, `train_examples` or `image_size`"
        )
