"""A real run killed at random moments ends as the undisturbed one, to the bit.

``pytest -m slow tests/kill_test.py -n0`` takes about half an hour: 100 runs end by SIGKILL, 20 by
SIGTERM, 20 find their newest checkpoint damaged, and 5 run out of disk.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

TRAIN = Path(__file__).parents[2] / "train.py"
# A checkpoint after each step, so that most moments are in the middle of one.
FLAGS = (
    "--recipe fast --epochs 5 --train-examples 1100 --test-examples 300 --checkpoint-seconds 0"
).split()
KILLS, STOPS, DAMAGES, FULL_DISKS = 100, 20, 20, 5

pytestmark = pytest.mark.slow


def start(run: Path, *flags: str) -> subprocess.Popen[str]:
    resume = ["--resume"] if (run / "config.json").exists() else []
    command = [sys.executable, TRAIN, *FLAGS, "--run-dir", run, *resume, *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=run.parent
    )


def finish(run: Path) -> str:
    """Runs to the end; returns what it said."""
    process = start(run)
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
    folder: Path, signum: int, count: int, seconds: float, expected: object
) -> Iterator[tuple[Path, subprocess.Popen[str], str]]:
    """Interrupts runs until there were as many as asked for; yields each interrupted one.

    A run that ends in spite of it is compared with the undisturbed one, and a new one is begun.
    """
    moments = random.Random(0)
    done, runs = 0, 0
    while done < count:
        run = folder / f"run{runs}"
        known = rows(run)
        process = start(run)
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
    finish(run)
    assert result(run) == expected


def test_killed_runs_end_as_the_undisturbed_one(tmp_path, undisturbed):
    seconds, expected = undisturbed
    for _, process, said in interrupted_runs(tmp_path, signal.SIGKILL, KILLS, seconds, expected):
        assert process.returncode == -signal.SIGKILL, said


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
