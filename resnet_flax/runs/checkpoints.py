"""Checkpoints: the arrays of a state, and the position in the run, to go on from.

Orbax writes one in the background, and gives it its name when all of it is on the disk; the
checksums of its files follow.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from flax import serialization

from resnet_flax.errors import InputError, TrainingError, one_line
from resnet_flax.machine.devices import from_first_process, text_from_first_process
from resnet_flax.machine.files import whole_file
from resnet_flax.training.position import Position
from resnet_flax.training.step import TrainState

if TYPE_CHECKING:  # it takes a third of a second, for which no start need wait
    from orbax.checkpoint import CheckpointManager

logger = logging.getLogger(__name__)

LATEST_KEPT = 3
SUMS = "SHA256SUMS"
LARGEST_REST = 4_000_000  # bytes of a checkpoint beside its arrays


class Checkpoints:
    """The checkpoints of a run: its last three, and that of the best test accuracy.

    Use it in a ``with`` statement: at its end the last checkpoint is on the disk. In a run of
    several processes the first alone writes and reads them; the others have no folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._first = folder is not None
        if folder is None:
            return
        self.folder = folder
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    @cached_property
    def _checkpoints(self) -> "CheckpointManager":
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        for name in ("absl", "asyncio"):  # what Orbax logs is told in a line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        accuracy = itemgetter("test_acc")
        best = BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)
        return ocp.CheckpointManager(
            self.folder.absolute(),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                "position": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            },
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,  # what a killed run left
                enable_async_checkpointing=False,  # all of it is in a thread of ours
                multiprocessing_options=alone,
                preservation_policy=AnyPreservationPolicy([LatestN(LATEST_KEPT), best]),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._first:
            self.finish()
            self._thread.shutdown()
            if "_checkpoints" in vars(self):
                self._checkpoints.close()

    def save(self, state: TrainState, position: Position, test_acc: float | None = None) -> None:
        """Keeps the state and position: copies them, and writes the copies in the background.

        The test accuracy is given where an epoch ended with that state.

        Raises:
            TrainingError: when the one before could not be written; those before it are whole.
        """
        if self._first:
            self.finish()
            arrays = jax.tree.map(np.array, serialization.to_state_dict(state))
            key = int(state.step) + len(position.results)  # counts steps and evaluations
            self._pending = self._thread.submit(self._save, key, arrays, position, test_acc)

    def finish(self) -> None:
        """Waits until what was saved last is on the disk.

        Raises:
            TrainingError: when it could not be written; those before it are whole.
        """
        pending, self._pending = self._pending, None
        try:
            if pending:
                pending.result()
        except Exception as error:  # a full disk comes as an error of Orbax' or TensorStore's
            reason = one_line(error)
            if "space" in reason.lower() or "ENOSPC" in reason:
                reason = "no space left on the device"
            kept = (
                "; the earlier checkpoints are whole" if any(self.folder.glob(f"*/{SUMS}")) else ""
            )
            raise TrainingError(
                f"cannot write to {self.folder.parent}: {reason[:300]}{kept}: mend it, and go on "
                "with `resume`"
            ) from error

    def restore(self, state: TrainState) -> tuple[TrainState, Position]:
        """Returns the newest whole checkpoint, or ``state`` at the run's beginning without any.

        Raises:
            InputError: when there are checkpoints, and all are damaged.
        """
        arrays = jax.tree.map(np.asarray, serialization.to_state_dict(state))
        position = Position()
        if self._first and any(self.folder.iterdir()):
            arrays, position = self._newest(arrays)
        if jax.process_count() > 1:
            arrays = from_first_process(arrays)
            place = text_from_first_process(json.dumps(position.as_json()))
            position = Position.from_json(json.loads(place))
        restored: TrainState = serialization.from_state_dict(state, arrays)
        return restored, position

    def _save(self, key: int, arrays: Any, position: Position, test_acc: float | None) -> None:
        import orbax.checkpoint as ocp

        if key in self._checkpoints.all_steps():
            return
        # Asked before, since a disk that fills up under Orbax has it print one traceback an array.
        size = sum(array.nbytes for array in jax.tree.leaves(arrays))
        if shutil.disk_usage(self.folder).free < 2 * size + LARGEST_REST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        place = ocp.args.JsonSave(position.as_json())
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), position=place)
        metrics = None if test_acc is None else {"test_acc": test_acc}
        self._checkpoints.save(key, args=items, metrics=metrics, force=True)
        folder = self.folder / str(key)
        with whole_file(folder / SUMS) as unfinished:
            unfinished.write_text(_sums(folder))

    def _newest(self, arrays: Any) -> tuple[Any, Position]:
        useless: list[int] = []
        found, damaged = None, False
        for key in sorted(self._checkpoints.all_steps(), reverse=True):
            try:
                found = self._read(key, arrays)
                break
            except Exception as error:  # Orbax and TensorStore raise errors of many kinds
                # The newest may be of a run that was killed before its last file.
                if not useless and not (self.folder / str(key) / SUMS).exists():
                    logger.warning("checkpoint %d is unfinished", key)
                else:
                    damaged = True
                    logger.warning("checkpoint %d is damaged (%s)", key, one_line(error)[:200])
                useless.append(key)
        if damaged and not found:
            raise InputError(
                f"cannot resume {self.folder.parent}: all its checkpoints are damaged; "
                "start a new run, or restore the folder from a copy"
            )
        for key in useless:  # they would stand in the way of new ones
            self._checkpoints.delete(key)
        return found or (arrays, Position())

    def _read(self, key: int, arrays: Any) -> tuple[Any, Position]:
        """Reads a checkpoint; raises whatever is wrong with it, before much memory is taken."""
        import orbax.checkpoint as ocp

        folder = self.folder / str(key)
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        if size > 4 * sum(array.nbytes for array in jax.tree.leaves(arrays)) + LARGEST_REST:
            raise ValueError(f"{size} bytes are too many")
        if _sums(folder) != (folder / SUMS).read_text():
            raise ValueError(f"its files are not those in {SUMS}")
        saved = self._checkpoints.item_metadata(key)["state"].tree
        if jax.tree.map(_kind, saved) != jax.tree.map(_kind, arrays):
            raise ValueError("it holds other arrays")
        items = {"state": ocp.args.StandardRestore(arrays), "position": ocp.args.JsonRestore()}
        read = self._checkpoints.restore(key, args=ocp.args.Composite(**items))
        return read["state"], Position.from_json(read["position"])


def _sums(folder: Path) -> str:
    """SHA-256 of all files in it, in the format of ``sha256sum``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and SUMS not in path.name)
    lines = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder)}\n")
    return "".join(lines)


def _kind(array: Any) -> tuple[tuple[int, ...], str]:
    return tuple(array.shape), np.dtype(array.dtype).name
