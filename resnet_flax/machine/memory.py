"""How much memory this machine lets a process have."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def machine_memory() -> int:
    """Bytes that the machine has, or that the container or the job it runs in may take."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _limits():
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(file.read_text()))
    return min(limits)


def _limits() -> Iterator[Path]:
    """Files of this process's control group, and of those that it is in, of versions 2 and 1."""
    groups = {}
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controller, path = line.split(":", 2)
            groups[controller] = path
    for controller, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        own = Path(groups.get(controller, "/"))
        for group in (own, *own.parents):
            yield CONTROL_GROUPS / controller / group.relative_to("/") / name
