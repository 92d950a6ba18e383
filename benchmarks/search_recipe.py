"""Searches for better settings of a recipe, by the accuracy on the last 5,000 training images.

``python -m benchmarks.search_recipe --minutes N`` never looks at the test set. First it runs the
recipe itself, then each change of one setting in `SPACE`, then it climbs: the best so far with one
more change, and every third run repeats one of the three best with another seed, so that the
ranking is not a seed's luck. What is not expected to end in time is not begun; one run there always
is. At the end, and at Ctrl-C, it prints a table in Markdown; each run leaves a line of JSON at
once.
"""

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax

from benchmarks.tables import RESULTS, commit, heading, line, versions
from resnet_flax import TrainConfig, train
from resnet_flax.errors import TrainingError
from resnet_flax.nn.resnet import ARCHITECTURES, build_model
from resnet_flax.training.position import EpochResult
from resnet_flax.training.recipes import RECIPES, Recipe

FOUND = RESULTS / "search_recipe.jsonl"
TRIAL = "trial"  # the name of a trial's recipe and network
CLIMBS_TO_A_REPEAT = 3
OF_THE_NETWORK = ("channels", "stage_sizes")

Settings = dict[str, Any]
Space = Mapping[str, Sequence[Any]]
# Of each setting the most promising value first.
SPACE: Space = {
    "erase": (0.5, 0.15, 0.0),
    "epochs": (200, 60, 22),
    "channels": (96, 128, 64),
    "average_decay": (0.999, 0.9995, 0.998),
    "label_smoothing": (0.05, 0.15, 0.1),
    "learning_rate": (0.02, 0.045, 0.03),
    "weight_decay": (0.05, 0.01, 0.02),
    "shift": (3, 1, 2),
    "stage_sizes": ((3, 3, 3), (2, 3, 3), (4, 4, 4), (2, 2, 2)),
}
TINY: Space = {"epochs": (1,), "channels": (4,), "stage_sizes": ((1,),)}


class Trial(NamedTuple):
    """A finished run: all its settings, and its seconds from beginning to end."""

    settings: Settings
    seed: int
    results: list[EpochResult]  # none where it failed
    seconds: float

    @property
    def accuracy(self) -> float:
        """After the last epoch; 0 for a run that failed."""
        return self.results[-1].test_acc if self.results else 0.0


def main() -> None:
    """Searches, and prints the ranking."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, help="for all runs together")
    parser.add_argument("--recipe", choices=RECIPES, default="best")
    parser.add_argument("--seed", type=int, default=0, help="of the first runs, and of the search")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on any machine")
    parser.add_argument("--output", type=Path, default=FOUND)
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    model = build_model(recipe.model, recipe.flavour)
    start = {name: getattr(model if name in OF_THE_NETWORK else recipe, name) for name in SPACE}
    space, examples = SPACE, {"validation_examples": 5000}
    if options.tiny:
        start |= {name: value for name, (value,) in TINY.items()}
        space, examples = {**SPACE, **TINY}, {"train_examples": 256, "validation_examples": 64}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("")

    def note(trial: Trial) -> None:
        row = {
            "recipe": options.recipe,
            "settings": trial.settings,
            "seed": trial.seed,
            "accuracies": [result.test_acc for result in trial.results],
            "seconds": round(trial.seconds, 1),
            "device": jax.devices()[0].device_kind,
            "commit": commit(),
            "versions": versions(),
        }
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        figures = f"{trial.accuracy:.4f} in {trial.seconds:.0f} s, seed {trial.seed}"
        print(f"{figures}: {describe(trial.settings, start)}", flush=True)

    run, seconds = partial(run_trial, recipe, examples), 60 * options.minutes
    trials = search(run, seconds, start=start, space=space, seed=options.seed, note=note)
    print("\n" + as_table(trials, start))


def search(
    run: Callable[[Settings, int], list[EpochResult]],
    seconds: float,
    *,
    start: Settings,
    space: Space,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    note: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Runs ``start``, each single change of it, and then climbs, until the time is up or Ctrl-C.

    Args:
        run: settings, seed -> results by epoch.
        seconds: for all runs together; the first is done in any case.
        start: a value for each setting.
        space: setting -> values to try.
        seed: of the runs, but for repeated ones, and of what is drawn.
        clock: tells the time in seconds.
        note: called after each run.
    """
    until, drawn = clock() + seconds, random.Random(seed)
    trials: list[Trial] = []

    def attempt(settings: Settings, seed: int) -> bool:
        started = clock()
        if trials and started + expected_seconds(settings, trials) > until:
            return False
        results = run(settings, seed)
        trials.append(Trial(settings, seed, results, clock() - started))
        note(trials[-1])
        return True

    try:
        for settings in (start, *single_changes(start, space)):
            attempt(settings, seed)
        for turn in itertools.count(1):
            ranked = rank(trials)
            tried = [rows[0].settings for rows in ranked]
            further = [each for each in single_changes(tried[0], space) if each not in tried]
            wanted = [(each, seed) for each in drawn.sample(further, len(further))]
            best = sorted(ranked[:3], key=len)  # the best of those with the fewest seeds first
            repeats = [(rows[0].settings, seed + len(rows)) for rows in best]
            wanted = wanted + repeats if turn % CLIMBS_TO_A_REPEAT else repeats + wanted
            if not any(attempt(*each) for each in wanted):  # it stops at the first that is run
                break
    except KeyboardInterrupt:
        pass
    return trials


def single_changes(settings: Settings, space: Space) -> list[Settings]:
    """All settings with one other value: the first of each setting, then the second, and so on."""
    others = (
        [settings | {name: value} for value in values if value != settings[name]]
        for name, values in space.items()
    )
    return [each for turn in itertools.zip_longest(*others) for each in turn if each]


def expected_seconds(settings: Settings, trials: Sequence[Trial]) -> float:
    """How long a run should take at most, by those of as large a network, or else by all."""

    def work(settings: Settings) -> int:
        return settings["channels"] ** 2 * sum(settings["stage_sizes"])

    def scaled(trial: Trial) -> float:
        epoch = statistics.mean(result.seconds for result in trial.results)
        growth = max(1.0, work(settings) / work(trial.settings))
        return trial.seconds + epoch * (growth * settings["epochs"] - len(trial.results))

    done = [trial for trial in trials if trial.results]
    alike = [trial for trial in done if work(trial.settings) == work(settings)]
    return max(map(scaled, alike or done), default=0.0)


def rank(trials: Sequence[Trial]) -> list[list[Trial]]:
    """The runs of the same settings together, the best mean first."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial.settings.items()), []).append(trial)
    return sorted(groups.values(), key=mean_accuracy, reverse=True)


def mean_accuracy(trials: Sequence[Trial]) -> float:
    """Over the seeds."""
    return statistics.mean(trial.accuracy for trial in trials)


def run_trial(
    recipe: Recipe, examples: Mapping[str, Any], settings: Settings, seed: int
) -> list[EpochResult]:
    """Trains the recipe with other settings, in a folder that is not kept; empty if it failed."""
    network = {name: settings[name] for name in OF_THE_NETWORK}
    others = {name: value for name, value in settings.items() if name not in network}
    with (
        patch.dict(RECIPES, {TRIAL: dataclasses.replace(recipe, model=TRIAL, **others)}),
        patch.dict(ARCHITECTURES, {TRIAL: ARCHITECTURES[recipe.model] | network}),
        tempfile.TemporaryDirectory() as folder,
    ):
        config = TrainConfig(recipe=TRIAL, seed=seed, run_dir=Path(folder), **examples)
        try:
            return train(config).results
        except (TrainingError, jax.errors.JaxRuntimeError) as error:  # such as too little memory
            print(f"failed: {error}", file=sys.stderr)
            return []
        finally:
            jax.clear_caches()


def describe(settings: Settings, start: Settings) -> str:
    """What differs from the start."""
    changed = [f"{name} {value}" for name, value in settings.items() if value != start[name]]
    return ", ".join(changed) or "the recipe itself"


def as_table(trials: Sequence[Trial], start: Settings) -> str:
    """The ranking in Markdown."""
    columns = ("settings", "epochs", "mean validation accuracy", "seeds", "seconds a run")
    lines = [heading(columns)]
    for rows in rank(trials):
        settings, seconds = rows[0].settings, statistics.mean(row.seconds for row in rows)
        figures = (f"{mean_accuracy(rows):.4f}", f"{len(rows)}", f"{seconds:.0f}")
        lines.append(line((describe(settings, start), f"{settings['epochs']}", *figures)))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
