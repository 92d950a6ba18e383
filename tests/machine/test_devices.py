"""A run on several devices, and in several processes, is the run on one."""

import os
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
    result: Path, devices: int, *processes: str, folder: str | Path = "-"
) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.sharded_run", result, folder, *processes],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


def coordinator() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


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
    finish(start(result, 1))
    return result


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(tmp_path, one_device):
    finish(start(tmp_path / "eight.npz", 8))
    check_same(tmp_path / "eight.npz", one_device, 8)


def test_two_processes_of_two_devices_compute_what_one_does(tmp_path, one_device):
    address = coordinator()
    result = tmp_path / "four.npz"
    finish(*(start(result, 2, address, "2", str(number)) for number in range(2)))
    check_same(result, one_device, 4)
    assert sorted(path.name for path in result.with_suffix(".run").iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
    ]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, one_device):
    result = tmp_path / "changing.npz"
    run = result.with_suffix(".run")
    shutil.copytree(one_device.with_suffix(".run"), run)
    shutil.rmtree(max((run / CHECKPOINTS).iterdir(), key=lambda folder: int(folder.name)))
    address = coordinator()
    finish(*(start(result, 1, address, "2", str(number)) for number in range(2)))
    check_same(result, one_device, 2)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images, 150 of them to train on, and the run of one process."""
    root = tmp_path_factory.mktemp("streamed")
    names = [f"class{label}" for label in range(10)]
    write_classes(root / "images" / "train", names, 15, (12, 9))
    write_classes(root / "images" / "test", names, 2, (9, 12))
    finish(start(root / "one.npz", 1, folder=root / "images"))
    with np.load(root / "one.npz") as one:
        assert len(one["seen"]) == 2 * (10 + 2)
        assert len({*one["seen"]}) == 2 * 10 + 2  # the test set's are the same in each epoch
    return root / "images", root / "one.npz"


def test_four_processes_read_what_one_does(tmp_path, streamed):
    """Each reads its share; of the last batch's 6 images, all."""
    folder, one = streamed
    address = coordinator()
    result = tmp_path / "four.npz"
    finish(*(start(result, 1, address, "4", str(n), folder=folder) for n in range(4)))
    check_same(result, one, 4)


@pytest.mark.slow
def test_a_streamed_run_goes_on_in_another_number_of_processes(tmp_path, streamed):
    folder, one = streamed
    result = tmp_path / "changing.npz"
    run = result.with_suffix(".run")
    shutil.copytree(one.with_suffix(".run"), run)
    shutil.rmtree(max((run / CHECKPOINTS).iterdir(), key=lambda each: int(each.name)))
    address = coordinator()
    finish(*(start(result, 2, address, "2", str(n), folder=folder) for n in range(2)))
    check_same(result, one, 4, first_epoch=2)


@pytest.mark.slow
def test_two_processes_of_two_devices_read_what_one_does(tmp_path, streamed):
    folder, one = streamed
    address = coordinator()
    result = tmp_path / "four.npz"
    finish(*(start(result, 2, address, "2", str(n), folder=folder) for n in range(2)))
    check_same(result, one, 4)
