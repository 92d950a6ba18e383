from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from resnet_flax.training import progress as progress_module
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.position import EpochResult
from resnet_flax.training.progress import Progress, duration, final_report

FEED = SimpleNamespace(sizes=[256] * 10, waited=0.0)

STEP = Metrics(jnp.float32(256.0), jnp.int32(128), jnp.int32(256))


@pytest.fixture(autouse=True)
def log(caplog):
    """What is told on the way."""
    caplog.set_level("INFO", "resnet_flax")
    return caplog


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    return now


def run_steps(reporter: Progress, clock: list[float], count: int, seconds: float) -> None:
    with reporter.epoch(1, FEED) as on_step:
        for finished in range(count + 1):
            sums = Metrics(STEP.loss_sum * finished, STEP.correct * finished, STEP.count * finished)
            on_step(finished, sums)
            clock[0] += seconds


def test_a_long_run_is_announced_once_with_cheaper_choices(clock, log):
    reporter = Progress(10, 96)
    run_steps(reporter, clock, 10, seconds=15.0)
    error = log.text
    # It is told after the first step; 100 - 1 are left.
    assert error.count("this run will take about 0:24:45 (h:mm:ss)") == 1
    assert "cheaper: `recipe` fast, `image_size` 28, fewer `epochs`" in error


def test_steps_beside_the_compiler_do_not_count(clock, log):
    progress = Progress(1000, 96)
    with progress.compiling():
        clock[0] = 7.0
    with progress.epoch(1, FEED) as on_step:
        for finished, now in enumerate([7, 17, 26, 30, 34, 38]):
            assert "will take" not in log.text
            clock[0] = now
            on_step(finished, STEP)
    # A step takes 4 s after the first 19; STEP says that all but one of 10,000 are left.
    assert "will take about 11:06:36" in log.text


def test_a_later_epoch_does_not_wait_for_the_compiler_again(clock, log):
    progress = Progress(1000, 96)
    with progress.compiling():
        clock[0] = 7.0
    run_steps(progress, clock, 10, seconds=2.0)  # settled at 28, it ends at 29
    assert "will take" not in log.text
    run_steps(progress, clock, 6, seconds=2.0)
    assert "will take" in log.text


def test_a_short_run_is_not_announced(clock, log):
    run_steps(Progress(10, 96), clock, 10, seconds=1.0)
    assert "will take" not in log.text


def test_the_cheap_image_size_is_not_advised_to_those_who_have_it(clock, log):
    run_steps(Progress(10, 28), clock, 10, seconds=60.0)
    assert "cheaper: fewer `epochs`" in log.text


def test_plain_lines_where_the_output_is_no_terminal(clock, log):
    run_steps(Progress(1, 96), clock, 4, seconds=40.0)
    lines = log.messages
    assert lines == [
        "epoch 1/1, step 2/10: loss 1.000, acc 0.500, 6.4 examples/s, 0:05:20 left",
        "epoch 1/1, step 4/10: loss 1.000, acc 0.500, 6.4 examples/s, 0:04:00 left",
    ]


def test_a_bar_in_a_terminal(clock, capsys, monkeypatch):
    reporter = Progress(2, 96)
    monkeypatch.setattr(reporter, "shown", True)
    run_steps(reporter, clock, 4, seconds=40.0)
    error = capsys.readouterr().err
    assert "step 4/10" in error
    assert "loss 1.000, acc 0.500, 6.4 examples/s" in error


def test_closing_lines_are_d2ls():
    results = [
        EpochResult(1, 0.5, 0.8, 0.7, 100.0, 2.0),
        EpochResult(2, 0.0141, 0.9961, 0.8949, 50.0, 2.0),
    ]
    assert final_report(results, "cuda:0") == (
        "loss 0.014, train acc 0.996, test acc 0.895\n66.7 examples/sec on cuda:0"
    )


def test_duration():
    assert duration(3 * 3600 + 62.4) == "3:01:02"
