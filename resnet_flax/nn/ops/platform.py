"""Where a formulation is chosen: when its program is compiled, by the platform it is for."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

traced_for: Any = jax.make_user_context(None)
"""``with traced_for("cpu"):`` what is traced inside is for that platform of JAX's alone.

Tracing then takes a quarter of the time for a GPU, and two thirds for a CPU; the program does not
export for others. What was traced outside is traced anew, and the other way round.
"""


def choose(*args: Any, cpu: Callable[..., Any], accelerator: Callable[..., Any]) -> Any:
    """Calls ``cpu`` in programs for a CPU, and ``accelerator`` in those for a GPU or TPU."""
    if platform := traced_for.value:
        return (cpu if platform == "cpu" else accelerator)(*args)
    return lax.platform_dependent(*args, cpu=cpu, default=accelerator)


def barrier_on_cpu(values: Any) -> Any:
    """Keeps a CPU from computing the values again in what uses them; a GPU is quicker without."""
    return choose(values, cpu=lax.optimization_barrier, accelerator=lambda values: values)
