"""How much memory this machine lets a process have."""

import contextlib
import os
from pathlib import Path

CONTAINER_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of control groups 2 and 1


def machine_memory() -> int:
    """Bytes that the machine has, or that the container it runs in may take."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(limits)
