"""The folder of a run: what is in it, which folder a run has, and whether it may go on there."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from resnet_flax.errors import InputError, reason
from resnet_flax.inference.pretrained import CONFIG, LARGEST_CONFIG
from resnet_flax.machine.files import whole_file
from resnet_flax.runs.config import TrainConfig, as_json
from resnet_flax.training.position import EpochResult
from resnet_flax.training.recipes import RECIPES

RUNS = Path("runs")
FORMAT = 2  # of config.json: version 0.1.0 wrote none
# What else is in a run folder, beside the configuration and the weights.
METRICS, CHECKPOINTS, CARD = "metrics.jsonl", "checkpoints", "README.md"
CURVES, CONFUSION = "curves.png", "confusion.png"
PREDICTIONS, MISTAKES = "predictions.png", "mistakes.png"
# Fields that a resumed run may change without becoming another run; the epochs decide a schedule.
FREE_FIELDS = {"epochs", "data_dir", "run_dir", "resume", "checkpoint_seconds", "tensorboard"}
FREE_FIELDS |= {"deterministic", "coordinator", "num_processes", "process_id", "follow_links"}


def open_run(config: TrainConfig, network: Mapping[str, Any] | None = None) -> Path:
    """Makes or finds the folder of a run, and writes its configuration and its network's.

    Raises:
        InputError: when it cannot be written, holds another run, or has nothing to resume.
    """
    new = config.run_dir or RUNS / datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = _resumed_folder(config) if config.resume else new
    try:
        if not config.resume and (folder / CONFIG).exists():
            mend = "add `resume` to go on with it, or name another"
            raise InputError(f"`run_dir` {folder} holds a run already: {mend}")
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the run folder {folder}: {reason(error)}") from error
    content = {**as_json(config), "format": FORMAT, "network": network}
    with whole_file(folder / CONFIG) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
    return folder


def write_metrics(folder: Path, results: Sequence[EpochResult]) -> None:
    """Writes a line for each epoch, of all results, so that no resume loses or repeats one.

    Raises:
        InputError: when it cannot be written.
    """
    with whole_file(folder / METRICS) as unfinished:
        unfinished.write_text("".join(json.dumps(row._asdict()) + "\n" for row in results))


def _resumed_folder(config: TrainConfig) -> Path:
    """The folder of the run that goes on: ``run_dir``, or the newest in ``runs/``."""
    folder = config.run_dir
    if not folder:
        runs = sorted(RUNS.glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime)
        if not runs:
            raise InputError(f"nothing to resume: there is no run in {RUNS}/")
        folder = runs[-1].parent
    saved = _saved_config(folder)
    one_rate = RECIPES[config.recipe].optimizer == "sgd"  # whatever the number of epochs
    free = FREE_FIELDS - (set() if one_rate else {"epochs"})
    differing = [
        f"`{name}` {saved.get(name)!r:.60} there, {value!r} here"
        for name, value in as_json(config).items()
        if name not in free and saved.get(name) != value
    ]
    if differing:
        raise InputError(f"cannot resume {folder}, whose run differs: {'; '.join(differing)}")
    return folder


def _saved_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        with path.open() as file:
            saved = json.loads(file.read(LARGEST_CONFIG))
        if not isinstance(saved, dict):
            raise ValueError("not a table of flags")
    except FileNotFoundError as error:
        raise InputError(f"nothing to resume: {folder} holds no run (no {CONFIG})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot resume: {path} is unreadable: {reason(error)}") from error
    if "format" not in saved and saved.get("recipe") in ("fast", "best"):
        # Version 0.1.0 trained these recipes' networks whatever model and flavour said.
        recipe = RECIPES[saved["recipe"]]
        saved |= {"model": recipe.model, "flavour": recipe.flavour}
    return saved
