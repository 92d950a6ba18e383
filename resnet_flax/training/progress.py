"""What a person sees of a training: a bar in a terminal or notebook, a line a minute elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import jax
from tqdm.auto import tqdm
from tqdm.notebook import tqdm as notebook_tqdm

from resnet_flax.training.feed import Feed
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.position import EpochResult

SECONDS_BETWEEN_LINES = 60.0
# The length of the run is told by the speed when the compiler no longer takes its share of the
# machine: beside training, the last batch's program takes up to three times as long as the first.
COMPILATIONS_TO_SETTLE = 3
SECONDS_OF_ESTIMATE = 10.0
LONG_RUN_SECONDS = 600.0
WORTH_A_WORD = 0.1  # of the time
CHEAP_IMAGE_SIZE = 28  # Fashion-MNIST's own

logger = logging.getLogger(__name__)


class Progress:
    """Shows the steps of a run.

    Args:
        epochs: the last epoch's number.
        image_size: of the run, in pixels; tells what would be cheaper.
    """

    def __init__(self, epochs: int, image_size: int) -> None:
        self.epochs = epochs
        self.cheaper = "fewer `epochs` or `train_examples`"
        if image_size > CHEAP_IMAGE_SIZE:
            self.cheaper = f"`recipe` fast, `image_size` {CHEAP_IMAGE_SIZE}, {self.cheaper}"
        terminal = sys.stderr is not None and sys.stderr.isatty()
        # Of several processes the first alone speaks.
        self.shown = jax.process_index() == 0 and (terminal or issubclass(tqdm, notebook_tqdm))
        self.settles_at = 0.0  # on time.perf_counter's clock
        self.estimated = self.told_of_waiting = False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Tells how long the compiler took."""
        logger.info("compiling the training step ...")
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.settles_at = ended + COMPILATIONS_TO_SETTLE * (ended - started)
        logger.info("compiled in %.1f s", ended - started)

    @contextmanager
    def epoch(
        self, epoch: int, feed: Feed, done: int = 0
    ) -> Iterator[Callable[[int, Metrics], None]]:
        """Reports one epoch; yields the callback for each step.

        Args:
            epoch: its number.
            feed: tells the sizes of its batches, and how long the devices waited for them.
            done: how many of them are finished already.
        """
        started = last_line = time.perf_counter()
        sizes, waited_before = feed.sizes, feed.waited
        title = f"epoch {epoch}/{self.epochs}"
        settled, settled_at = done, started
        remaining_epochs = (self.epochs - epoch) * sum(sizes)
        with tqdm(
            total=len(sizes),
            initial=done,
            desc=title,
            unit="step",
            dynamic_ncols=True,
            disable=not self.shown,
            bar_format="{desc} |{bar}| step {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        ) as bar:

            def on_step(finished: int, metrics: Metrics) -> None:
                nonlocal last_line, settled, settled_at
                if finished == done:
                    return
                now = time.perf_counter()
                rate = sum(sizes[done:finished]) / (now - started)
                examples_left = remaining_epochs + sum(sizes) - int(metrics.count)
                share = (feed.waited - waited_before) / (now - started)
                waiting = f", {share:.0%} waiting for images" if feed.waited else ""
                figures = (
                    f"loss {metrics.loss:.3f}, acc {metrics.accuracy:.3f}, "
                    f"{rate:.1f} examples/s{waiting}, {duration(examples_left / rate)} left"
                )
                bar.set_postfix_str(figures, refresh=False)
                bar.update(finished - bar.n)
                if now < self.settles_at:
                    settled, settled_at = finished, now
                elif not self.estimated and now - settled_at > SECONDS_OF_ESTIMATE:
                    self.estimated = True
                    left = examples_left * (now - settled_at) / sum(sizes[settled:finished])
                    if left > LONG_RUN_SECONDS:
                        logger.info(
                            f"this run will take about {duration(left)} (h:mm:ss) on this "
                            f"{jax.devices()[0].platform}; cheaper: {self.cheaper}"
                        )
                if not self.shown and now - last_line > SECONDS_BETWEEN_LINES:
                    last_line = now
                    logger.info(f"{title}, step {finished}/{len(sizes)}: {figures}")

            yield on_step
        share = (feed.waited - waited_before) / (time.perf_counter() - started)
        if share > WORTH_A_WORD and not self.told_of_waiting:
            self.told_of_waiting = True
            logger.warning(
                f"the input is the bottleneck: the devices waited for images {share:.0%} of the "
                "time; a quicker disk, smaller images in the files, more `workers` and more cores "
                "for them, or `draft` would help"
            )


def final_report(results: list[EpochResult], device: str) -> str:
    """D2L's two closing lines; the rate is over the training time of all epochs."""
    last = results[-1]
    rate = len(results) / sum(1 / result.examples_per_sec for result in results)
    return (
        f"loss {last.loss:.3f}, train acc {last.train_acc:.3f}, test acc {last.test_acc:.3f}\n"
        f"{rate:.1f} examples/sec on {device}"
    )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as ``h:mm:ss``."""
    return str(timedelta(seconds=round(seconds)))
