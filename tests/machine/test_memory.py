"""`resnet_flax.machine.memory`: the machine's, or what a container or a job leaves."""

import os

import pytest

from resnet_flax.machine import memory
from resnet_flax.machine.memory import machine_memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
FILES = ["memory.max", "memory/memory.limit_in_bytes"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file of the control groups, or which of them the process is in."""
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")

    def write(content, name="../own"):
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


@pytest.mark.usefixtures("write")
def test_without_control_groups_it_is_the_machines():
    assert machine_memory() == MACHINE


@pytest.mark.parametrize("name", FILES)
def test_a_containers_limit_counts(name, write):
    write("1073741824\n", name)
    assert machine_memory() == 2**30


@pytest.mark.parametrize("content", ["max\n", "", "9223372036854771712\n"])  # the last of version 1
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_limit_does_not_count(name, content, write):
    write(content, name)
    assert machine_memory() == MACHINE


def test_the_smallest_limit_counts(write):
    write("4000000", "memory.max")
    write("3000000", "memory/memory.limit_in_bytes")
    assert machine_memory() == 3_000_000


def test_a_group_that_cannot_be_read_does_not_count(write, tmp_path):
    write("", "memory")
    (tmp_path / "cgroup" / "memory.max").mkdir()
    assert machine_memory() == MACHINE


@pytest.mark.parametrize("group", ["job_7", "job_7/step_0/task_1"])
@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("0::/slurm/{}\n", "slurm/job_7/memory.max"),
        ("9:cpu,cpuacct:/\n4:memory:/slurm/{}\n0::/\n", "memory/slurm/job_7/memory.limit_in_bytes"),
    ],
)
def test_a_jobs_limit_counts(own, name, group, write):
    """As SLURM and systemd set it, for the process's group or one around it."""
    write(own.format(group))
    write("max" if "max" in name else "9223372036854771712", name.replace("job_7/", ""))
    write("2000000", name)
    assert machine_memory() == 2_000_000


def test_a_containers_own_path_need_not_be_there(write):
    write("4:memory:/docker/0123456789ab\n0::/../../other\n")
    write("2000000", "memory/memory.limit_in_bytes")
    assert machine_memory() == 2_000_000
