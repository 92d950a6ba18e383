"""One run on many devices: each has the whole network, and its share of every batch.

JAX's compiler splits the computation by how its arguments are placed, and adds the sums over
devices: gradients, losses, and the statistics of the batch normalisations, which are those of the
whole batch on any number of devices. A run may be of several processes, on one machine or on many.
"""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_flax.errors import InputError, reason
from resnet_flax.machine.memory import machine_memory

# Number of processes, as the launchers that JAX knows say it.
LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")

STREAMED_SHARE = 0.25  # of the memory: what would take more stays on the disk


def join_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process with the others of its run, if there are any.

    Where neither a coordinator is given, ``HOST:PORT`` of the first process, nor SLURM or Open MPI
    started several processes, there is this one alone. In those launchers' environment the number
    of processes is found, and which of them this is, from 0.

    Raises:
        InputError: when they cannot be reached.
    """
    launched = any(os.environ.get(name, "") not in ("", "0", "1") for name in LAUNCHERS)
    if not (coordinator or launched):
        return
    jax.config.update("jax_enable_preemption_service", False)  # interruption.py sees to SIGTERM
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"cannot join the other processes: {reason(error, 300)}") from error


def data_mesh() -> Mesh:
    """All devices of all processes, along one axis named ``data``."""
    return jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places arrays, the same in each process, whole on every device."""
    return jax.tree.map(lambda leaf: _place(np.asarray(leaf), replicated(mesh)), tree)


def split_batch(indices: np.ndarray, mesh: Mesh) -> jax.Array:
    """Gives each device its share of a batch, or of each of several.

    The indices, (..., B), are the same in each process. If B is not a multiple of the number of
    devices, every device gets the whole batch: right as well, but no quicker than one.
    """
    return _place(indices, batch_sharding(indices.shape, mesh))


def batch_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where `split_batch` places batches of that shape."""
    along = "data" if shape[-1] % mesh.size == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), along))


def local_rows(size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch of that size this process's devices get, ascending."""
    needed = np.zeros(size, bool)
    places = batch_sharding((size,), mesh).addressable_devices_indices_map((size,))
    for rows in places.values():
        needed[rows] = True
    return np.flatnonzero(needed)


def split_rows(local: np.ndarray, size: int, mesh: Mesh) -> jax.Array:
    """A batch of that size, (size, ...), of which each process has its `local_rows`."""
    mine = local_rows(size, mesh)

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        first = np.searchsorted(mine, start)
        return local[first : first + stop - start]

    shape, sharding = (size, *local.shape[1:]), batch_sharding((size,), mesh)
    return jax.make_array_from_callback(shape, sharding, rows)


def memory() -> float:
    """Bytes of the smaller of this machine's memory and that of one of its devices."""
    known = [device.memory_stats() or {} for device in jax.local_devices()]
    return min(machine_memory(), *(each.get("bytes_limit", math.inf) for each in known))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_first_process(tree: Any) -> Any:
    """The first process's arrays, in all processes."""
    return multihost_utils.broadcast_one_to_all(tree)


def text_from_first_process(text: str) -> str:
    """The first process's text, in all processes."""
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(from_first_process(np.array(content.size)))
    return from_first_process(np.resize(content, size)).tobytes().decode()


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
