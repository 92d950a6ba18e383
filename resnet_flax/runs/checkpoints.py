"""The run folder: configuration, metrics, and checkpoints to go on from.

A checkpoint holds the arrays of the state and the position in the run. Orbax writes it, in the
background, and gives it its name when all of it is on the disk; the checksums of its files follow.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from resnet_flax.errors import InputError, TrainingError, one_line
from resnet_flax.machine.devices import from_first_process, text_from_first_process
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.run_folder import as_json, new_folder, resumed_folder
from resnet_flax.training.position import Position
from resnet_flax.training.step import TrainState

LATEST_KEPT = 3
BEST = BestN(
    get_metric_fn=lambda metrics: metrics["test_acc"], n=1, keep_checkpoints_without_metrics=False
)
SUMS = "SHA256SUMS"
LARGEST_REST = 4_000_000  # bytes of a checkpoint beside its arrays


class RunFolder:
    """A folder with ``config.json``, ``metrics.jsonl`` and ``checkpoints/``, one for each run.

    Use it in a ``with`` statement: at its end the last checkpoint is on the disk. In a run of
    several processes the first alone writes and reads it.

    Args:
        config: the run; its ``run_dir`` and ``resume`` decide which folder.
        say: told in a line when a checkpoint is damaged.
        network: what ``config.json`` says of the network besides, in JSON's types.

    Raises:
        InputError: when the folder cannot be written, holds another run, or has nothing to resume.
    """

    def __init__(
        self,
        config: TrainConfig,
        say: Callable[[str], None] = print,
        network: Mapping[str, Any] | None = None,
    ) -> None:
        self._first = jax.process_index() == 0
        if not self._first:
            return
        self.path = resumed_folder(config) if config.resume else new_folder(config)
        self._say = say
        for name in ("absl", "asyncio"):  # what Orbax logs is told in a line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with self._explained():
            (self.path / "checkpoints").mkdir(exist_ok=True)
            content = {**as_json(config), "network": network}
            _write(self.path / "config.json", json.dumps(content, indent=2) + "\n")
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        self._checkpoints = ocp.CheckpointManager(
            (self.path / "checkpoints").absolute(),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                "position": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            },
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,  # what a killed run left
                enable_async_checkpointing=False,  # all of it is in a thread of ours
                multiprocessing_options=alone,
                preservation_policy=AnyPreservationPolicy([LatestN(LATEST_KEPT), BEST]),
            ),
        )
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._first:
            with self._explained():
                self._wait()
            self._thread.shutdown()
            self._checkpoints.close()

    def save(self, state: TrainState, position: Position) -> None:
        """Keeps the state and position: copies them, and writes the copies in the background.

        Raises:
            TrainingError: when the one before could not be written; those before it are whole.
        """
        if self._first:
            with self._explained():
                self._wait()
            key = int(state.step) + len(position.results)  # counts steps and evaluations
            if key not in self._checkpoints.all_steps():
                arrays = jax.tree.map(np.array, serialization.to_state_dict(state))
                self._pending = self._thread.submit(self._save, key, arrays, position)

    def restore(self, state: TrainState) -> tuple[TrainState, Position]:
        """Returns the newest whole checkpoint, or ``state`` at the run's beginning without any.

        Args:
            state: gives the shapes and dtypes.

        Raises:
            InputError: when there are checkpoints, and all are damaged.
        """
        arrays = jax.tree.map(np.asarray, serialization.to_state_dict(state))
        position = Position()
        if self._first:
            arrays, position = self._newest(arrays)
        if jax.process_count() > 1:
            arrays = from_first_process(arrays)
            where = text_from_first_process(json.dumps(position.as_json()))
            position = Position.from_json(json.loads(where))
        restored: TrainState = serialization.from_state_dict(state, arrays)
        return restored, position

    def _save(self, key: int, arrays: Any, position: Position) -> None:
        tested = position.results and position.steps == 0
        # Asked before, since a disk that fills up under Orbax has it print one traceback an array.
        size = sum(array.nbytes for array in jax.tree.leaves(arrays))
        if shutil.disk_usage(self.path).free < 2 * size + LARGEST_REST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._checkpoints.save(
            key,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), position=ocp.args.JsonSave(position.as_json())
            ),
            metrics={"test_acc": position.results[-1].test_acc} if tested else None,
            force=True,
        )
        folder = self.path / "checkpoints" / str(key)
        _write(folder / SUMS, _sums(folder))
        # Rewritten from the position's own rows, so that no resume can lose or repeat a line.
        rows = [json.dumps(row._asdict()) + "\n" for row in position.results]
        _write(self.path / "metrics.jsonl", "".join(rows))

    def _newest(self, arrays: Any) -> tuple[Any, Position]:
        keys = sorted(self._checkpoints.all_steps(), reverse=True)
        found, useless, damaged = None, [], False
        for key in keys:
            try:
                found = self._read(key, arrays)
                break
            except Exception as error:  # Orbax and TensorStore raise errors of many kinds
                useless.append(key)
                if key == keys[0] and not (self.path / "checkpoints" / str(key) / SUMS).exists():
                    self._say(f"checkpoint {key} is unfinished")  # killed before its last file
                    continue
                damaged = True
                self._say(f"checkpoint {key} is damaged ({one_line(error)[:200]})")
        if damaged and not found:
            raise InputError(
                f"cannot resume {self.path}: all its checkpoints are damaged; "
                "start a new run, or restore the folder from a copy"
            )
        for key in useless:  # they would stand in the way of new ones
            self._checkpoints.delete(key)
        return found or (arrays, Position())

    def _read(self, key: int, arrays: Any) -> tuple[Any, Position]:
        """Reads a checkpoint; raises whatever is wrong with it, before much memory is taken."""
        folder = self.path / "checkpoints" / str(key)
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        if size > 4 * sum(array.nbytes for array in jax.tree.leaves(arrays)) + LARGEST_REST:
            raise ValueError(f"{size} bytes are too many")
        if _sums(folder) != (folder / SUMS).read_text():
            raise ValueError(f"its files are not those in {SUMS}")
        saved = self._checkpoints.item_metadata(key)["state"].tree
        if jax.tree.map(_kind, saved) != jax.tree.map(_kind, arrays):
            raise ValueError("it holds other arrays")
        read = self._checkpoints.restore(
            key,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(arrays), position=ocp.args.JsonRestore()
            ),
        )
        return read["state"], Position.from_json(read["position"])

    def _wait(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what goes wrong in writing into one line."""
        try:
            yield
        except Exception as error:  # a full disk comes as an error of Orbax' or TensorStore's
            reason = one_line(error)
            if "space" in reason.lower() or "ENOSPC" in reason:
                reason = "no space left on the device"
            raise TrainingError(
                f"cannot write to {self.path}: {reason[:300]}; the earlier checkpoints are whole: "
                "mend it, and go on with --resume"
            ) from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


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
