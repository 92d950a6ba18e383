"""Where a formulation is chosen: when its program is compiled, by the platform it is for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax import lax

_forced = False


def choose(*args: Any, cpu: Callable[..., Any], accelerator: Callable[..., Any]) -> Any:
    """Calls ``cpu`` in programs for a CPU, and ``accelerator`` in those for a GPU or TPU."""
    if _forced:
        return accelerator(*args)
    return lax.platform_dependent(*args, cpu=cpu, default=accelerator)


def barrier_on_cpu(values: Any) -> Any:
    """Keeps a CPU from computing the values again in what uses them; a GPU is quicker without."""
    return choose(values, cpu=lax.optimization_barrier, accelerator=lambda values: values)


@contextmanager
def force_accelerator() -> Iterator[None]:
    """Programs traced inside take the accelerator's formulations on a CPU too: for tests."""
    global _forced
    jax.clear_caches()
    _forced = True
    try:
        yield
    finally:
        _forced = False
        jax.clear_caches()
