"""The run folder: configuration, metrics, and Orbax checkpoints to go on from."""

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import serialization

from resnet_flax.config import TrainConfig, flag
from resnet_flax.errors import InputError
from resnet_flax.metrics import EpochResult
from resnet_flax.recipes import RECIPES
from resnet_flax.training import TrainState

RUNS = Path("runs")
# Fields that a resumed run may change without becoming another run; the epochs decide a schedule.
FREE_FIELDS = {"epochs", "data_dir", "run_dir", "resume"}


class RunFolder:
    """A folder with ``config.json``, ``metrics.jsonl`` and ``checkpoints/``, one for each run.

    Args:
        config: the run; its ``run_dir`` and ``resume`` decide which folder.

    Raises:
        InputError: when the folder cannot be written, holds another run, or has nothing to resume.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = _resumed_folder(config) if config.resume else _new_folder(config)
        self._write("config.json", json.dumps(_as_json(config), indent=2) + "\n")
        self._checkpoints = ocp.CheckpointManager(
            (self.path / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def save(self, state: TrainState, results: list[EpochResult]) -> None:
        """Saves the state and all metrics so far as the checkpoint of the last epoch."""
        rows = [result._asdict() for result in results]
        self._checkpoints.save(
            results[-1].epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(serialization.to_state_dict(state)),
                results=ocp.args.JsonSave(rows),
            ),
        )
        # Rewritten from the checkpoint's own rows, so that no resume can lose or repeat a line.
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def restore(self, state: TrainState) -> tuple[TrainState, list[EpochResult]]:
        """Returns the last checkpoint's state and metrics, or ``state`` and none without one.

        Args:
            state: gives the shapes and dtypes, and where the arrays are placed.
        """
        epoch = self._checkpoints.latest_step()
        if epoch is None:
            return state, []
        target = serialization.to_state_dict(state)
        restored = self._checkpoints.restore(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), results=ocp.args.JsonRestore()
            ),
        )
        results = [EpochResult(**row) for row in restored["results"]]
        return serialization.from_state_dict(state, restored["state"]), results

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(self.path / name)


def _new_folder(config: TrainConfig) -> Path:
    path = config.run_dir or RUNS / datetime.now().strftime("%Y%m%d-%H%M%S")
    if (path / "config.json").exists():
        raise InputError(
            f"--run-dir {path} holds a run already: add --resume to go on with it, or name another"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the run folder {path}: {error.strerror}") from error
    return path


def _resumed_folder(config: TrainConfig) -> Path:
    if config.run_dir:
        path = config.run_dir
    else:
        runs = sorted(RUNS.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
        if not runs:
            raise InputError(f"nothing to resume: there is no run in {RUNS}/")
        path = runs[-1].parent
    try:
        saved = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise InputError(f"nothing to resume: {path} holds no run (no config.json)") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot resume: {path / 'config.json'} is unreadable: {error}") from error
    asked = _as_json(config)
    free = FREE_FIELDS - ({"epochs"} if RECIPES[config.recipe].one_cycle else set())
    differing = [
        f"{flag(name)} {saved.get(name)} there, {value} here"
        for name, value in asked.items()
        if name not in free and saved.get(name) != value
    ]
    if differing:
        raise InputError(f"cannot resume {path}, whose run differs: {'; '.join(differing)}")
    return path


def _as_json(config: TrainConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
