"""`benchmarks.search_recipe`: which runs it begins, and what it makes of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.search_recipe import (
    SPACE,
    Settings,
    Trial,
    as_table,
    expected_seconds,
    rank,
    run_trial,
    search,
    single_changes,
)
from resnet_flax import ARCHITECTURES, TrainConfig, build_model
from resnet_flax.errors import TrainingError
from resnet_flax.training.position import EpochResult
from resnet_flax.training.recipes import RECIPES
from tests.support.snippets import ROOT

START: Settings = {"epochs": 2, "erase": 0.0, "channels": 4, "stage_sizes": (1,)}
# The start's own values are among them: to come back to it is no new run.
OTHERS = {"epochs": (4, 2), "erase": (0.5, 0.25, 0.0), "channels": (4,), "stage_sizes": ((1,),)}


def results(accuracy: float, epochs: int = 2, seconds: float = 1.0) -> list[EpochResult]:
    return [EpochResult(n + 1, 0.0, 0.0, accuracy, 1.0, seconds) for n in range(epochs)]


class Machine:
    """Runs of 3 seconds and 1 more an epoch, whose accuracy a function tells."""

    def __init__(self, accuracy: Any) -> None:
        self.accuracy, self.now, self.runs = accuracy, 100.0, []

    def search(self, seconds: float, space: Any = OTHERS) -> list[Trial]:
        return search(self.run, seconds, start=START, space=space, clock=lambda: self.now, seed=7)

    def run(self, settings: Settings, seed: int) -> list[EpochResult]:
        self.now += 3 + settings["epochs"]
        self.runs.append((settings, seed))
        return results(self.accuracy(settings, seed), settings["epochs"])


def by_settings(settings: Settings, seed: int) -> float:
    return 0.9 + settings["erase"] / 10 + settings["epochs"] / 1000


def test_the_recipe_then_each_single_change_then_the_best_with_one_more() -> None:
    machine = Machine(by_settings)
    trials = machine.search(60)
    assert machine.runs[:4] == [
        (START, 7),
        (START | {"epochs": 4}, 7),
        (START | {"erase": 0.5}, 7),
        (START | {"erase": 0.25}, 7),
    ]
    assert machine.runs[4] == (START | {"erase": 0.5, "epochs": 4}, 7)  # one change of the best
    assert [(trial.settings, trial.seed) for trial in trials] == machine.runs


def test_every_third_further_run_repeats_one_of_the_three_best() -> None:
    many = {**OTHERS, "erase": tuple(n / 100 for n in range(40))}
    machine = Machine(by_settings)
    machine.search(500, many)
    further = machine.runs[1 + len(single_changes(START, many)) :]
    assert len(further) > 9
    seeds = [seed for _, seed in further[:-1]]  # the last is what still fits
    assert [seed > 7 for seed in seeds] == [turn % 3 == 2 for turn in range(len(seeds))]
    assert len({str(run) for run in machine.runs}) == len(machine.runs)  # none twice


def test_where_nothing_new_is_left_it_repeats_the_three_best_alike() -> None:
    machine = Machine(by_settings)
    ranked = rank(machine.search(200))
    counts = [len(rows) for rows in ranked]
    assert max(counts[:3]) - min(counts[:3]) <= 1
    assert counts[3:] == [1] * len(counts[3:])
    assert [trial.seed for trial in ranked[0]] == list(range(7, 7 + counts[0]))


def test_what_would_not_end_in_time_is_not_begun() -> None:
    machine = Machine(by_settings)
    machine.search(0)
    assert machine.runs == [(START, 7)]
    machine = Machine(by_settings)
    machine.search(11)  # 5 s for a run, and 7 s for one of 4 epochs
    assert machine.runs == [(START, 7), (START | {"erase": 0.5}, 7)]
    assert machine.now - 100 <= 11


def test_a_larger_network_is_expected_to_take_longer() -> None:
    small = Trial(START, 0, results(0.9), 5.0)
    assert expected_seconds(START, [small]) == 5
    assert expected_seconds(START | {"epochs": 10}, [small]) == 13
    larger = START | {"channels": 8, "stage_sizes": (2,)}
    assert expected_seconds(larger, [small]) == 3 + 2 * 8
    known = Trial(larger, 0, results(0.9, seconds=2.0), 7.0)
    assert expected_seconds(larger, [small, known]) == 7
    assert expected_seconds(START, [small, known]) == 5
    failed = Trial(larger, 0, [], 1.0)
    assert expected_seconds(larger, [small, failed]) == 3 + 2 * 8


def test_the_mean_over_the_seeds_ranks_and_stands_in_the_table() -> None:
    lucky = START | {"erase": 0.5, "epochs": 4}
    trials = [
        Trial(START, 0, results(0.91), 5.0),
        Trial(lucky, 0, results(0.93), 8.0),
        Trial(START | {"stage_sizes": (2,)}, 0, [], 1.0),
        Trial(lucky, 1, results(0.87), 6.0),
    ]
    assert as_table(trials, START).splitlines()[2:] == [
        "| the recipe itself | 2 | 0.9100 | 1 | 5 |",
        "| epochs 4, erase 0.5 | 4 | 0.9000 | 2 | 7 |",
        "| stage_sizes (2,) | 2 | 0.0000 | 1 | 1 |",
    ]


def test_ctrl_c_leaves_what_is_done() -> None:
    def accuracy(settings: Settings, seed: int) -> float:
        if settings["erase"]:
            raise KeyboardInterrupt
        return 0.9

    trials = Machine(accuracy).search(1000)
    assert [trial.settings for trial in trials] == [START, START | {"epochs": 4}]


def test_a_run_that_fails_is_told_and_leaves_no_recipe_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: TrainConfig) -> NoReturn:
        assert config.epochs == 2
        assert RECIPES[config.recipe].erase == 0.5
        assert build_model(config.model).channels == 4
        raise TrainingError("the loss is nan")

    monkeypatch.setattr("benchmarks.search_recipe.train", fail)
    names = [*RECIPES, *ARCHITECTURES]
    assert run_trial(RECIPES["best"], {}, START | {"erase": 0.5}, seed=0) == []
    assert "the loss is nan" in capsys.readouterr().err
    assert [*RECIPES, *ARCHITECTURES] == names


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    output = tmp_path / "search.json"
    command = [sys.executable, "-m", "benchmarks.search_recipe", "--tiny", "--minutes", "0"]
    command += ["--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["recipe"] == "best"
    assert row["settings"].keys() == SPACE.keys()
    assert len(row["accuracies"]) == row["settings"]["epochs"] == 1
    assert row["seconds"] > 0
    assert {"device", "versions", "seed"} <= row.keys()
    assert f"| the recipe itself | 1 | {row['accuracies'][0]:.4f} | 1 |" in done.stdout
