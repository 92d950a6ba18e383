"""Which folder a run has, and whether it may go on there."""

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from resnet_flax.errors import InputError, one_line
from resnet_flax.runs.config import TrainConfig, flag
from resnet_flax.training.recipes import RECIPES

RUNS = Path("runs")
# Fields that a resumed run may change without becoming another run; the epochs decide a schedule.
FREE_FIELDS = {
    "epochs",
    "data_dir",
    "run_dir",
    "resume",
    "checkpoint_seconds",
    "tensorboard",
    "deterministic",
    "coordinator",
    "num_processes",
    "process_id",
}
LARGEST_CONFIG = 1_000_000  # bytes


def new_folder(config: TrainConfig) -> Path:
    """Makes the folder of a run that begins.

    Raises:
        InputError: when it cannot be written, or holds a run already.
    """
    path = config.run_dir or RUNS / datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        if (path / "config.json").exists():
            raise InputError(
                f"--run-dir {path} holds a run already: "
                "add --resume to go on with it, or name another"
            )
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the run folder {path}: {error.strerror}") from error
    return path


def resumed_folder(config: TrainConfig) -> Path:
    """Finds the folder of the run that goes on: ``run_dir``, or the newest in ``runs/``.

    Raises:
        InputError: when there is none, or its configuration differs in what matters.
    """
    if config.run_dir:
        path = config.run_dir
    else:
        runs = sorted(RUNS.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
        if not runs:
            raise InputError(f"nothing to resume: there is no run in {RUNS}/")
        path = runs[-1].parent
    try:
        with (path / "config.json").open() as file:
            saved = json.loads(file.read(LARGEST_CONFIG))
        if not isinstance(saved, dict):
            raise ValueError("not a table of flags")
    except FileNotFoundError as error:
        raise InputError(f"nothing to resume: {path} holds no run (no config.json)") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error)[:200]
        raise InputError(
            f"cannot resume: {path / 'config.json'} is unreadable: {reason}"
        ) from error
    asked = as_json(config)
    free = FREE_FIELDS - ({"epochs"} if RECIPES[config.recipe].muon else set())
    differing = [
        f"{flag(name)} {saved.get(name)!r:.60} there, {value!r} here"
        for name, value in asked.items()
        if name not in free and saved.get(name) != value
    ]
    if differing:
        raise InputError(f"cannot resume {path}, whose run differs: {'; '.join(differing)}")
    return path


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration in JSON's types."""
    fields = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
