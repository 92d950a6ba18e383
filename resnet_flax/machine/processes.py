"""Runs of several processes, on one machine or on many."""

import os

import jax

from resnet_flax.errors import InputError, one_line
from resnet_flax.runs.config import TrainConfig

# Number of processes, as the launchers that JAX knows say it.
LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def join_processes(config: TrainConfig) -> None:
    """Connects this process with the others of its run, if there are any.

    They are named by ``--coordinator``, ``--num-processes`` and ``--process-id``, or found in the
    environment that SLURM or Open MPI made.

    Raises:
        InputError: when they cannot be reached.
    """
    launched = any(int(os.environ.get(name) or 1) > 1 for name in LAUNCHERS)
    if not (config.coordinator or launched):
        return
    jax.config.update("jax_enable_preemption_service", False)  # interruption.py sees to SIGTERM
    try:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"cannot join the other processes: {one_line(error)[:300]}") from error
