"""The loop over epochs and steps: where it may stop, and what it then leaves behind."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from resnet_flax.errors import InputError, TrainingError
from resnet_flax.machine.devices import any_process, replicate
from resnet_flax.machine.interruption import Interrupted, Interruption
from resnet_flax.training.compilation import EVALUATION, Programs, compile_programs
from resnet_flax.training.feed import Feed
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.position import EpochResult, Position
from resnet_flax.training.progress import Progress
from resnet_flax.training.step import TrainState

Event = Callable[[TrainState, Position], None]
# Several processes ask each other this often, in calls, whether to save or to stop.
CALLS_BETWEEN_AGREEMENTS = 8


class Job(NamedTuple):
    """What does not change during a run.

    Attributes:
        feed: the batches.
        epochs: the last epoch's number.
        step_options: of `resnet_flax.training.train_step`.
        eval_options: of `resnet_flax.training.eval_step`.
        mesh: the devices.
        seconds_between_checkpoints: in an epoch; its end is always kept.
    """

    feed: Feed
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
        job: batches, and how to train.
        state: donated.
        position: where the run is.
        progress: told of each step.
        save: called to keep what was reached within an epoch.
        epoch_ended: called to keep what was reached after an epoch and its evaluation.
        interruption: read after each step.

    Raises:
        TrainingError: when the loss is no longer finite, or images cannot be read; what was saved
            stays.
        Interrupted: when the run was asked to stop; what was reached is saved.
    """
    if position.epoch > job.epochs:
        return state, position
    feed = job.feed
    with progress.compiling():
        programs = compile_programs(
            state,
            feed,
            position.steps,
            mesh=job.mesh,
            step_options=job.step_options,
            eval_options=job.eval_options,
            # Of several processes all compile or none: on GPUs they share the measurements.
            wanted=lambda: not any_process(interruption.requested is not None),
        )
    with interruption.deferred(), programs, closing(feed):
        while position.epoch <= job.epochs:
            with progress.epoch(position.epoch, feed, position.steps) as on_step:
                state, position = train_epoch(
                    job, state, position, programs, on_step, save=save, interruption=interruption
                )
            started = time.perf_counter()
            tested = replicate(Metrics.empty(), job.mesh)
            with faults_stop(lambda: save(state, position)):  # noqa: B023
                for arguments in feed.test():
                    stop_if_asked(state, position, save, interruption)
                    tested = programs(EVALUATION, state, tested, *arguments)
            result = EpochResult(
                epoch=position.epoch,
                loss=position.metrics.loss,
                train_acc=position.metrics.accuracy,
                test_acc=tested.accuracy,
                examples_per_sec=sum(feed.sizes) / position.training_seconds,
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
    programs: Programs,
    on_step: Callable[[int, Metrics], None],
    *,
    save: Event,
    interruption: Interruption,
) -> tuple[TrainState, Position]:
    """The rest of an epoch's steps.

    ``programs`` is called with a stack's shape and what `resnet_flax.training.train_steps` takes,
    ``on_step`` with the number of finished steps and their sums; the rest is as in `fit`.
    """
    feed, steps = job.feed, len(job.feed.sizes)
    metrics = replicate(position.metrics, job.mesh)
    started = time.perf_counter() - position.training_seconds
    saved, waited = time.perf_counter(), programs.waited

    def reached(steps: int) -> Position:
        check_finite(metrics, position.epoch, steps)
        seconds = time.perf_counter() - started - (programs.waited - waited)
        return position.replace(steps=steps, metrics=metrics, training_seconds=seconds)

    done = position.steps
    with faults_stop(lambda: save(state, reached(done))):
        calls = feed.train(position.epoch, done, lambda: metrics)  # the newest, when it is called
        for number, call in enumerate(calls):
            before = metrics
            state, metrics = programs(call.shape, state, metrics, *call.arguments)
            # Reading the sums before this call leaves the device busy, with one call in flight.
            check_finite(before, position.epoch, done)
            on_step(done, before)
            done += call.steps
            if jax.process_count() > 1 and number % CALLS_BETWEEN_AGREEMENTS:
                continue
            due = time.perf_counter() - saved > job.seconds_between_checkpoints
            if any_process(due or interruption.requested is not None):
                here = reached(done)  # waits for the steps under way, which count
                saving = time.perf_counter()
                stop_if_asked(state, here, save, interruption)
                save(state, here)
                saved = time.perf_counter()
                started += saved - saving  # the rate is that of the training alone
    position = reached(steps)
    on_step(steps, metrics)
    return state, position


@contextmanager
def faults_stop(save: Callable[[], None]) -> Iterator[None]:
    """Saves what was reached when images turn out to be broken on the way, and stops the run.

    Raises:
        TrainingError: then.
    """
    try:
        yield
    except InputError as error:
        if jax.process_count() == 1:  # the others are not asked, and cannot take part
            save()
        raise TrainingError(f"{error}; what was saved goes on with `resume`") from error


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


def check_batches(sizes: list[int], image_size: int, total_stride: int) -> None:
    """Makes sure that the smallest batch can be normalised in the network's last stage.

    Raises:
        InputError: when that stage would hold a single value per channel.
    """
    if min(sizes) * math.ceil(image_size / total_stride) ** 2 < 2:
        raise InputError(
            f"the last batch would hold 1 image of {image_size}x{image_size} pixels, too few for "
            "batch normalisation: change `batch_size`, `train_examples` or `image_size`"
        )
