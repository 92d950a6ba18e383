"""The folder of a run: what is in it, which folder a run has, and whether it may go on there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from resnet_flax.errors import InputError, reason
from resnet_flax.inference.pretrained import CONFIG, LARGEST_CONFIG
from resnet_flax.machine.files import whole_file
from resnet_flax.runs.config import TrainConfig, as_json, from_json
from resnet_flax.training.position import EpochResult
from resnet_flax.training.recipes import RECIPES

RUNS = Path("runs")
FORMAT = 2  # of config.json: version 0.1.0 wrote none
# What else is in a run folder, beside the configuration and the weights.
METRICS, CHECKPOINTS, CARD = "metrics.jsonl", "checkpoints", "README.md"
CURVES, CONFUSION = "curves.png", "confusion.png"
PREDICTIONS, MISTAKES = "predictions.png", "mistakes.png"
# Fields that are of one start of a run, and not of the next.
START_FIELDS = {"run_dir", "resume", "coordinator", "num_processes", "process_id"}
# Fields that a resumed run may change without becoming another run; the epochs decide a schedule.
FREE_FIELDS = {"epochs", "data_dir", "checkpoint_seconds", "tensorboard", "deterministic"}
FREE_FIELDS |= {"follow_links", "workers", "skip_broken", *START_FIELDS}


def resolve(config: TrainConfig) -> TrainConfig:
    """Names the run's folder; a resumed run, in ``run_dir`` or the newest, gets its own fields.

    Of these, the ones that were given are compared with the run's, or win where it may change. In a
    run of several processes each reads them.

    Raises:
        InputError: when there is nothing to resume, or another run.
    """
    if not config.resume:
        new = RUNS / f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # several may be started in one second
        return config if config.run_dir else replace(config, run_dir=new)
    folder = config.run_dir or _newest_run()
    saved = _saved_config(folder)
    one_rate = RECIPES[saved.recipe].optimizer == "sgd"  # whatever the number of epochs
    free = FREE_FIELDS - (set() if one_rate else {"epochs"})
    here, there = as_json(config), as_json(saved)
    differing = [
        f"`{name}` {there[name]!r:.60} there, {value!r} here"
        for name, value in here.items()
        if name in config.given - free and there[name] != value and value != "auto"
    ]
    if differing:
        raise InputError(f"cannot resume {folder}, whose run differs: {'; '.join(differing)}")
    own = {name: getattr(config, name) for name in START_FIELDS | (config.given & FREE_FIELDS)}
    return replace(saved, **own | {"run_dir": folder})


def open_run(config: TrainConfig, network: Mapping[str, Any] | None = None) -> Path:
    """Makes or finds the folder of a run, and writes its configuration and its network's.

    Raises:
        InputError: when it cannot be written, holds another run, or has nothing to resume.
    """
    config = resolve(config)
    content = {**as_json(config), "format": FORMAT, "network": network}
    folder = Path(content["run_dir"])
    try:
        if not config.resume and (folder / CONFIG).exists():
            mend = "add `resume` to go on with it, or name another"
            raise InputError(f"`run_dir` {folder} holds a run already: {mend}")
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the run folder {folder}: {reason(error)}") from error
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


def _newest_run() -> Path:
    runs = [file for file in RUNS.glob(f"*/{CONFIG}") if file.is_file()]
    if not runs:
        raise InputError(f"nothing to resume: there is no run in {RUNS}/")
    return max(runs, key=lambda file: file.stat().st_mtime).parent


def _saved_config(folder: Path) -> TrainConfig:
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            saved = json.loads(file.read(LARGEST_CONFIG))
        if not isinstance(saved, dict):
            raise ValueError("not a table of flags")
        saved.setdefault("stream", "never")  # as all runs were before it could be said
        if "format" not in saved and saved.get("recipe") in ("fast", "best"):
            # Version 0.1.0 trained these recipes' networks whatever model and flavour said.
            recipe = RECIPES[saved["recipe"]]
            saved |= {"model": recipe.model, "flavour": recipe.flavour}
        return from_json(saved)
    except FileNotFoundError as error:
        raise InputError(f"nothing to resume: {folder} holds no run (no {CONFIG})") from error
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"cannot resume: {path} is unreadable: {reason(error)}") from error
