"""A run on several devices, and in several processes, is the run on one."""

import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from resnet_flax.runs.run_folder import CHECKPOINTS
from tests.support.image_files import write_classes

ROOT = Path(__file__).parents[2]


def start(
    result: Path, devices: int, *arguments: str | Path, program: str = "sharded_run"
) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.support.{program}", result, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


def run_together(result: Path, devices: int, source: str | Path, processes: int) -> None:
    """One run of several processes with so many devices each."""
    numbers = map(str, range(processes))
    shared = (result, devices, source, coordinator(), str(processes))
    finish(*(start(*shared, number) for number in numbers))


def coordinator() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def copy_first_epoch(finished: Path, result: Path) -> None:
    """The folder of a finished run, without its last checkpoint, as that of another."""
    run = shutil.copytree(finished.with_suffix(".run"), result.with_suffix(".run"))
    shutil.rmtree(max((run / CHECKPOINTS).iterdir(), key=lambda folder: int(folder.name)))


def check_same(result: Path, one_device: Path, devices: int, first_epoch: int = 1) -> None:
    with np.load(result) as ours, np.load(one_device) as theirs:
        assert ours["devices"] == devices
        assert ours.files == theirs.files
        batches = len(theirs["seen"]) // 2  # of an epoch
        np.testing.assert_array_equal(ours["seen"], theirs["seen"][(first_epoch - 1) * batches :])
        for name in set(ours.files) - {"devices", "seen"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Path:
    result = tmp_path_factory.mktemp("sharding") / "one.npz"
    finish(start(result, 1, "-"))
    return result


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(tmp_path, one_device):
    finish(start(tmp_path / "eight.npz", 8, "-"))
    check_same(tmp_path / "eight.npz", one_device, 8)


@pytest.mark.slow
def test_two_processes_of_two_devices_compute_what_one_does(tmp_path, one_device):
    result = tmp_path / "four.npz"
    run_together(result, 2, "-", processes=2)
    check_same(result, one_device, 4)
    assert sorted(path.name for path in result.with_suffix(".run").iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
    ]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, one_device):
    result = tmp_path / "changing.npz"
    copy_first_epoch(one_device, result)
    run_together(result, 1, "-", processes=2)
    check_same(result, one_device, 2)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images, 150 of them to train on, and the run of one process."""
    root = tmp_path_factory.mktemp("streamed")
    names = [f"class{label}" for label in range(10)]
    write_classes(root / "images" / "train", names, 15, (12, 9))
    write_classes(root / "images" / "test", names, 2, (9, 12))
    finish(start(root / "one.npz", 1, root / "images"))
    with np.load(root / "one.npz") as one:
        assert len(one["seen"]) == 2 * (10 + 2)
        assert len({*one["seen"]}) == 2 * 10 + 2  # the test set's are the same in each epoch
    return root / "images", root / "one.npz"


@pytest.mark.slow
def test_four_processes_read_what_one_does(tmp_path, streamed):
    """Each reads its share; of the last batch's 6 images, all."""
    folder, one = streamed
    result = tmp_path / "four.npz"
    run_together(result, 1, folder, processes=4)
    check_same(result, one, 4)


@pytest.mark.slow
def test_a_streamed_run_goes_on_in_another_number_of_processes(tmp_path, streamed):
    folder, one = streamed
    result = tmp_path / "changing.npz"
    copy_first_epoch(one, result)
    run_together(result, 2, folder, processes=2)
    check_same(result, one, 4, first_epoch=2)


def test_two_processes_of_two_devices_read_what_one_does(tmp_path, streamed):
    folder, one = streamed
    result = tmp_path / "four.npz"
    run_together(result, 2, folder, processes=2)
    check_same(result, one, 4)


def test_halves_of_a_batch_are_normalised_by_halves_of_the_devices(tmp_path):
    result = tmp_path / "four.npz"
    finish(start(result, 4, program="grouped_run"))
    with np.load(result) as kept:
        for name in set(kept.files) - {"cpu program", "accelerator program"}:
            np.testing.assert_allclose(*kept[name], rtol=1e-10, atol=1e-12, err_msg=name)
        for name in ("cpu program", "accelerator program"):
            statistics, others = [], []
            for line in str(kept[name]).splitlines():
                if re.search(r" all-\w+(-start)?\(", line):
                    (statistics if "_batch_normalize_" in line else others).append(devices_of(line))
            assert len(statistics) >= 3 * 3  # of each layer, two sums forward and one message back
            assert statistics == [[[0, 1], [2, 3]]] * len(statistics)
            # Gradients and losses; and one message with what the halves add to running statistics
            # and to the gradients of scales and biases.
            assert [groups for groups in others if groups != [[0, 1, 2, 3]]] == [[[0, 2], [1, 3]]]


def devices_of(line: str) -> list[list[int]]:
    """Which devices send each other something, in any of the forms in which XLA writes it."""
    groups = re.search(r"replica_groups=(.*?)(, \w+=|$)", line)[1]
    if groups.startswith("{"):  # {{0,1},{2,3}}
        return [[*map(int, each.split(","))] for each in re.findall(r"[\d,]+\d", groups)]
    if groups.startswith("["):  # [2,2]<=[4], [2,2]<=[2,2]T(1,0)
        shape, order, axes = re.fullmatch(r"\[(.*)\]<=\[(.*?)\](?:T\((.*)\))?", groups).groups()
        shape, order = ([*map(int, numbers.split(","))] for numbers in (shape, order))
        axes = [*map(int, axes.split(","))] if axes else None
        return np.arange(math.prod(order)).reshape(order).transpose(axes).reshape(shape).tolist()
    # mesh['a'=2,'b'=2] {'b'}; of {'a':(2)4} the 4 that come after the first 2 of an axis
    mesh, along = groups.split("] {")
    sizes, parts = [], []
    for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh):
        if part := re.search(rf"'{axis}'(?::\((\d+)\)(\d+))?", along):
            before, inner = map(int, part.groups() if part[1] else (1, size))
            parts.append(len(sizes) + 1)
            sizes += [before, inner, int(size) // (before * inner)]
        else:
            sizes.append(int(size))
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    together = math.prod(sizes[part] for part in parts)
    return np.moveaxis(devices, parts, range(-len(parts), 0)).reshape(-1, together).tolist()
