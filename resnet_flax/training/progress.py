"""What a person sees while training runs: a bar in a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import jax
from tqdm import tqdm

from resnet_flax.runs.config import TrainConfig
from resnet_flax.training.metrics import EpochResult, Metrics

SECONDS_BETWEEN_LINES = 60.0
# The length of the run is told by the speed when the compiler no longer takes its share of the
# machine: beside training, the last batch's program takes up to three times as long as the first.
COMPILATIONS_TO_SETTLE = 3
SECONDS_OF_ESTIMATE = 10.0
LONG_RUN_SECONDS = 600.0
CHEAP_IMAGE_SIZE = 28  # Fashion-MNIST's own


class Progress:
    """Reports the steps of a run on stderr, and its epochs on stdout."""

    def __init__(self, config: TrainConfig) -> None:
        self.epochs = config.epochs
        self.cheaper = "fewer --epochs or --train-examples"
        if config.image_size > CHEAP_IMAGE_SIZE:
            self.cheaper = f"--recipe fast, --image-size {CHEAP_IMAGE_SIZE}, {self.cheaper}"
        self.first = jax.process_index() == 0  # of several processes it alone speaks
        self.terminal = sys.stderr.isatty() and self.first
        self.settles_at = 0.0  # on time.perf_counter's clock
        self.estimated = False

    def say(self, line: str) -> None:
        """Prints a line on stderr, above the bar if there is one."""
        if self.first:
            tqdm.write(line, file=sys.stderr)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Tells how long the compiler took."""
        self.say("compiling the training step ...")
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.settles_at = ended + COMPILATIONS_TO_SETTLE * (ended - started)
        self.say(f"compiled in {ended - started:.1f} s")

    @contextmanager
    def epoch(
        self, epoch: int, sizes: list[int], done: int = 0
    ) -> Iterator[Callable[[int, Metrics], None]]:
        """Reports one epoch; yields the callback for each step.

        Args:
            epoch: its number.
            sizes: of its batches.
            done: how many of them are finished already.
        """
        started = last_line = time.perf_counter()
        title = f"epoch {epoch}/{self.epochs}"
        settled, settled_at = done, started
        remaining_epochs = (self.epochs - epoch) * sum(sizes)
        with tqdm(
            total=len(sizes),
            initial=done,
            desc=title,
            unit="step",
            dynamic_ncols=True,
            disable=not self.terminal,
            bar_format="{desc} |{bar}| step {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        ) as bar:

            def on_step(finished: int, metrics: Metrics) -> None:
                nonlocal last_line, settled, settled_at
                if finished == done:
                    return
                now = time.perf_counter()
                rate = sum(sizes[done:finished]) / (now - started)
                examples_left = remaining_epochs + sum(sizes) - int(metrics.count)
                figures = (
                    f"loss {metrics.loss:.3f}, acc {metrics.accuracy:.3f}, "
                    f"{rate:.1f} examples/s, {duration(examples_left / rate)} left"
                )
                bar.set_postfix_str(figures, refresh=False)
                bar.update(finished - bar.n)
                if now < self.settles_at:
                    settled, settled_at = finished, now
                elif not self.estimated and now - settled_at > SECONDS_OF_ESTIMATE:
                    self.estimated = True
                    left = examples_left * (now - settled_at) / sum(sizes[settled:finished])
                    if left > LONG_RUN_SECONDS:
                        self.say(
                            f"this run will take about {duration(left)} (h:mm:ss) on this "
                            f"{jax.devices()[0].platform}; cheaper: {self.cheaper}"
                        )
                if not self.terminal and now - last_line > SECONDS_BETWEEN_LINES:
                    last_line = now
                    self.say(f"{title}, step {finished}/{len(sizes)}: {figures}")

            yield on_step

    def epoch_ended(self, result: EpochResult) -> None:
        """Prints the epoch's figures on stdout."""
        line = (
            f"epoch {result.epoch}/{self.epochs}: loss {result.loss:.3f}, "
            f"train acc {result.train_acc:.3f}, test acc {result.test_acc:.3f}, "
            f"{result.examples_per_sec:.1f} examples/sec, {result.seconds:.0f} s"
        )
        print(line, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as ``h:mm:ss``."""
    return str(timedelta(seconds=round(seconds)))
