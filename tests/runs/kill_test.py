"""A real run killed at random moments ends as the undisturbed one, to the bit.

``pytest -m slow tests/runs/kill_test.py -n0`` takes about an hour: 100 runs end by SIGKILL, 30 more
while worker processes read their images, 20 by SIGTERM, 20 find their newest checkpoint damaged,
and 5 run out of disk.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.image_files import write_classes

TRAIN = Path(__file__).parents[2] / "train.py"
# A checkpoint after each step, so that most moments are in the middle of one.
FLAGS = (
    "--recipe fast --epochs 5 --train-examples 1100 --test-examples 300 --checkpoint-seconds 0"
).split()
KILLS, STREAMED_KILLS, STOPS, DAMAGES, FULL_DISKS = 100, 30, 20, 20, 5
STREAMED = (
    "--dataset folder:../images --stream always --recipe finetune --model resnet8 --epochs 2 "
    "--image-size 16 --batch-size 64 --checkpoint-seconds 0"
).split()
MARK = "RUN_OF_KILL_TEST"  # in the environment of a run, and of the processes that it starts

pytestmark = pytest.mark.slow


def start(run: Path, job: list[str] = FLAGS) -> subprocess.Popen[str]:
    resume = ["--resume"] if (run / "config.json").exists() else []
    command = [sys.executable, TRAIN, *job, "--run-dir", run, *resume]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=run.parent, env=os.environ | {MARK: str(run)}, **pipes)


def left_over(run: Path) -> list[str]:
    """Processes that a run has started, and that are still there."""
    mark = f"{MARK}={run}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text())
    return found


def finish(run: Path, job: list[str] = FLAGS) -> str:
    """Runs to the end; returns what it said."""
    process = start(run, job)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return said


def rows(run: Path) -> list[tuple[float, ...]]:
    """The lines of metrics.jsonl, but for what depends on the clock."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    names = ("epoch", "loss", "train_acc", "test_acc")
    return [tuple(json.loads(line)[name] for name in names) for line in lines]


def result(run: Path) -> tuple[list[tuple[float, ...]], dict[str, bytes]]:
    weights = load_file(run / "model.safetensors")
    return rows(run), {name: array.tobytes() for name, array in weights.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, object]:
    """Seconds that a run takes, and its result."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(run)  # the compiled programs are kept from now on
    started = time.monotonic()
    again = run.with_name("again")
    finish(again)
    assert result(run) == result(again)
    return time.monotonic() - started, result(run)


def interrupted_runs(
    folder: Path,
    signum: int,
    count: int,
    seconds: float,
    expected: object,
    job: Callable[[int], list[str]] = lambda done: FLAGS,
) -> Iterator[tuple[Path, subprocess.Popen[str], str]]:
    """Interrupts runs until there were as many as asked for; yields each interrupted one.

    A run that ends in spite of it is compared with the undisturbed one, and a new one is begun.
    """
    moments = random.Random(0)
    done, runs = 0, 0
    while done < count:
        run = folder / f"run{runs}"
        known = rows(run)
        process = start(run, job(done))
        try:
            _, said = process.communicate(timeout=moments.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signum)
            _, said = process.communicate()
        assert rows(run)[: len(known)] == known, "an epoch was lost"
        assert "is damaged" not in said
        if process.returncode == 0:
            assert result(run) == expected
            runs += 1
            continue
        done += 1
        yield run, process, said
    run = folder / f"run{runs}"
    finish(run, job(done))
    assert result(run) == expected


def test_killed_runs_end_as_the_undisturbed_one(tmp_path, undisturbed):
    seconds, expected = undisturbed
    for _, process, said in interrupted_runs(tmp_path, signal.SIGKILL, KILLS, seconds, expected):
        assert process.returncode == -signal.SIGKILL, said


def test_killed_streamed_runs_end_as_the_undisturbed_one(tmp_path):
    """Each start has another number of workers, none of which outlives it."""
    names = [f"class{label}" for label in range(5)]
    write_classes(tmp_path / "images" / "train", names, 100, (24, 18))
    write_classes(tmp_path / "images" / "test", names, 20, (18, 24))
    (tmp_path / "runs").mkdir()
    finish(tmp_path / "runs" / "first", STREAMED)
    started = time.monotonic()
    finish(tmp_path / "runs" / "again", [*STREAMED, "--workers", "1"])
    seconds, expected = time.monotonic() - started, result(tmp_path / "runs" / "again")
    assert result(tmp_path / "runs" / "first") == expected

    def job(done: int) -> list[str]:
        return [*STREAMED, "--workers", str(done % 4)]

    steps = set()
    for run, process, said in interrupted_runs(
        tmp_path / "runs", signal.SIGKILL, STREAMED_KILLS, seconds, expected, job
    ):
        assert process.returncode == -signal.SIGKILL, said
        for _ in range(100):
            if not left_over(run):
                break
            time.sleep(0.1)
        assert not left_over(run)
        steps |= {path.name for path in (run / "checkpoints").glob("[0-9]*")}
    assert len(steps) > 5, "they were killed at different steps"


def test_stopped_runs_end_as_the_undisturbed_one(tmp_path, undisturbed):
    seconds, expected = undisturbed
    for _, process, said in interrupted_runs(tmp_path, signal.SIGTERM, STOPS, seconds, expected):
        # Python itself takes a moment to start before it can catch anything.
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), said
        assert "Traceback" not in said


def test_damaged_checkpoints_are_left_behind(tmp_path, undisturbed):
    seconds, expected = undisturbed
    chance = random.Random(0)
    damaged = 0
    for run, _, _ in interrupted_runs(tmp_path, signal.SIGKILL, 10**6, seconds, expected):
        folders = [path.parent for path in (run / "checkpoints").glob("*/SHA256SUMS")]
        if len(folders) < 2:
            continue
        newest = max(folders, key=lambda path: int(path.name))
        file = chance.choice([path for path in newest.rglob("*") if path.is_file()])
        content = bytearray(file.read_bytes())
        if chance.random() < 0.5 or not content:
            content = content[: len(content) // 2] + b"x" * (not content)
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        before = rows(run)
        said = finish(run)
        assert f"checkpoint {newest.name} is damaged" in said
        assert rows(run)[: len(before)] == before
        assert result(run) == expected
        damaged += 1
        if damaged == DAMAGES:
            return
        run.rename(run.with_name(f"damaged{damaged}"))


def test_a_full_disk_loses_nothing(tmp_path, undisturbed):
    _, expected = undisturbed
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    for size in range(FULL_DISKS):
        mebibytes = 12 + 3 * size
        subprocess.run([*mount, f"size={mebibytes}m", "tmpfs", small], check=True)
        try:
            run = small / "run"
            process = start(run)
            _, said = process.communicate()
            assert process.returncode == 1, said
            assert "no space left on the device" in said.splitlines()[-1]
            assert "Traceback" not in said
            subprocess.run([*mount, "remount,size=500m", "tmpfs", small], check=True)
            assert "is damaged" not in finish(run)
            assert result(run) == expected
        finally:
            subprocess.run(["umount", small], check=True)
