import json
from pathlib import Path

import chex
import jax
import pytest

from resnet_flax.checkpoint import RunFolder
from resnet_flax.config import TrainConfig
from resnet_flax.errors import InputError
from resnet_flax.metrics import EpochResult
from tests.small_run import new_state, random_data, run_epoch

RESULT = EpochResult(1, 0.5, 0.8, 0.7, 100.0, 2.0)


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    data = random_data(16)
    state, _ = run_epoch(new_state(data), data, 8)
    config = TrainConfig(run_dir=tmp_path / "run")
    folder = RunFolder(config)
    folder.save(state, [RESULT])
    resumed = RunFolder(TrainConfig(run_dir=tmp_path / "run", resume=True, epochs=12))
    fresh = new_state(data, seed=9)
    restored, results = resumed.restore(fresh)
    assert results == [RESULT]
    chex.assert_trees_all_equal(jax.tree.leaves(restored), jax.tree.leaves(state))
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 12


def test_metrics_file_has_one_line_an_epoch(tmp_path):
    state = new_state(random_data(2))
    folder = RunFolder(TrainConfig(run_dir=tmp_path))
    folder.save(state, [RESULT])
    folder.save(state, [RESULT, RESULT._replace(epoch=2)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert list(rows[0]) == [
        "epoch",
        "loss",
        "train_acc",
        "test_acc",
        "examples_per_sec",
        "seconds",
    ]


def test_a_folder_without_checkpoint_starts_anew(tmp_path):
    RunFolder(TrainConfig(run_dir=tmp_path))
    state = new_state(random_data(2))
    same, results = RunFolder(TrainConfig(run_dir=tmp_path, resume=True)).restore(state)
    assert same is state
    assert results == []


def test_a_run_is_not_overwritten(tmp_path):
    RunFolder(TrainConfig(run_dir=tmp_path))
    with pytest.raises(InputError, match="holds a run already: add --resume"):
        RunFolder(TrainConfig(run_dir=tmp_path))


def test_another_run_is_not_resumed(tmp_path):
    RunFolder(TrainConfig(run_dir=tmp_path))
    before = (tmp_path / "config.json").read_text()
    other = TrainConfig(run_dir=tmp_path, resume=True, seed=1, image_size=28)
    with pytest.raises(InputError) as error:
        RunFolder(other)
    assert "--image-size 96 there, 28 here; --seed 0 there, 1 here" in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


def test_nothing_to_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no run in runs/"):
        RunFolder(TrainConfig(resume=True))
    with pytest.raises(InputError, match="missing holds no run"):
        RunFolder(TrainConfig(resume=True, run_dir=Path("missing")))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_configuration_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot resume: .*config.json is unreadable"):
        RunFolder(TrainConfig(run_dir=tmp_path, resume=True))


def test_the_newest_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunFolder(TrainConfig(run_dir=Path("runs/a")))
    RunFolder(TrainConfig(run_dir=Path("runs/b"), resume=False))
    (first.path / "config.json").touch()
    assert RunFolder(TrainConfig(resume=True)).path == Path("runs/a")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"cannot write the run folder .*file/run: Not a directory"
    ):
        RunFolder(TrainConfig(run_dir=tmp_path / "file" / "run"))
