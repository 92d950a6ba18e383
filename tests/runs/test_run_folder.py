"""Which run goes on, with which flags; the other tests of a run's folder are `test_checkpoints`."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from resnet_flax.commands.command_line import parse_config
from resnet_flax.errors import InputError
from resnet_flax.runs.config import TrainConfig, as_json, from_json
from resnet_flax.runs.run_folder import open_run, resolve

FIELDS = {
    "recipe": "fast",
    "seed": 3,
    "batch_size": 7,
    "dataset": "folder:a b",
    "data_dir": Path("data"),
    "init": Path("x.safetensors"),
    "train_examples": 100,
    "checkpoint_seconds": 5,
    "deterministic": True,
}


@pytest.fixture
def run(tmp_path):
    """A run that had many flags."""
    return open_run(TrainConfig(run_dir=tmp_path / "run", **FIELDS))


def expected(run: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**FIELDS | {"run_dir": run, "resume": True} | changes)


def test_a_resumed_run_has_its_own_flags(run):
    assert resolve(TrainConfig(resume=True, run_dir=run)) == expected(run)
    assert resolve(parse_config(["--resume", "--run-dir", str(run)])) == expected(run)
    again = expected(run)
    assert resolve(again) == again  # to resolve twice is to resolve once


def test_the_newest_run_has_its_own_flags(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    Path("runs").symlink_to(".")
    (run.parent / "other").mkdir()
    (run.parent / "other" / "config.json").symlink_to("gone")
    assert resolve(parse_config(["--resume"])) == expected(Path("runs/run"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seed": 0}, "`seed` 3 there, 0 here"),  # the default, but given
        ({"recipe": "d2l"}, "`recipe` 'fast' there, 'd2l' here"),
        ({"batch_size": 256, "init": Path("y")}, "`batch_size` 7 there, 256 here; `init` 'x"),
        ({"test_examples": 5}, "`test_examples` None there, 5 here"),
    ],
)
def test_what_is_given_anew_is_compared(run, given, told):
    before = (run / "config.json").read_bytes()
    with pytest.raises(InputError) as error:
        resolve(TrainConfig(resume=True, run_dir=run, **given))
    assert str(error.value).startswith(f"cannot resume {run}, whose run differs: {told}")
    assert (run / "config.json").read_bytes() == before


def test_what_may_change_is_taken(run):
    changes = {"checkpoint_seconds": 7.0, "data_dir": Path("moved"), "tensorboard": True}
    same = {"recipe": "fast", "seed": 3, "train_examples": None}  # None is not given
    assert resolve(TrainConfig(resume=True, run_dir=run, **same, **changes)) == expected(
        run, **changes
    )


def test_a_run_of_before_streams_goes_on_without(run):
    file = run / "config.json"
    content = json.loads(file.read_text())
    del content["stream"]
    file.write_text(json.dumps(content))
    assert resolve(TrainConfig(resume=True, run_dir=run)).stream == "never"
    assert resolve(TrainConfig(resume=True, run_dir=run, stream="auto")).stream == "never"
    with pytest.raises(InputError, match="`stream` 'never' there, 'always' here"):
        resolve(TrainConfig(resume=True, run_dir=run, stream="always", dataset="folder:a b"))


def test_the_epochs_decide_a_schedule_that_the_run_names(tmp_path):
    for recipe in ("d2l", "best"):
        open_run(TrainConfig(run_dir=tmp_path / recipe, recipe=recipe))
    assert resolve(TrainConfig(resume=True, run_dir=tmp_path / "d2l", epochs=99)).epochs == 99
    with pytest.raises(InputError, match=r"`epochs` .* there, 99 here"):
        resolve(TrainConfig(resume=True, run_dir=tmp_path / "best", epochs=99))


def test_the_processes_are_those_of_this_start(tmp_path):
    there = {"coordinator": "host:1", "num_processes": 2, "process_id": 0}
    open_run(TrainConfig(run_dir=tmp_path, **there))
    alone = resolve(TrainConfig(resume=True, run_dir=tmp_path))
    assert (alone.coordinator, alone.num_processes, alone.process_id) == (None, None, None)
    here = {"coordinator": "other:2", "num_processes": 4, "process_id": 3}
    assert resolve(TrainConfig(resume=True, run_dir=tmp_path, **here)).process_id == 3


def test_runs_that_start_in_one_second_have_folders_of_their_own():
    assert len({resolve(TrainConfig()).run_dir for _ in range(5)}) == 5


def test_a_configuration_knows_what_it_was_given():
    config = TrainConfig(3, seed=0, data_dir=None)
    assert config.given == {"epochs", "seed"}
    assert TrainConfig().given == set()
    for same in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert (same, same.given) == (config, config.given)
    assert config == TrainConfig(epochs=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'seeds'"):
        TrainConfig(seeds=0)


def test_a_resumed_run_keeps_the_rate_that_it_had(tmp_path):
    started = TrainConfig(run_dir=tmp_path, recipe="imagenet", batch_size=64)
    open_run(started)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["learning_rate"], content["dtype"]) == (0.025, "bfloat16")
    for again in ({}, {"batch_size": 64}, {"recipe": "imagenet", "batch_size": 64}):
        resumed = resolve(TrainConfig(resume=True, run_dir=tmp_path, **again))
        assert dataclasses.replace(resumed, resume=False) == started
    with pytest.raises(InputError, match="`batch_size` 64 there, 128 here"):
        resolve(TrainConfig(resume=True, run_dir=tmp_path, batch_size=128))


@pytest.mark.parametrize("recipe", ["d2l", "fast", "best", "imagenet"])
def test_json_and_back(recipe):
    config = dataclasses.replace(TrainConfig(recipe=recipe), **FIELDS | {"recipe": recipe})
    content = json.loads(json.dumps(as_json(config)))
    assert from_json({**content, "format": 2, "network": {}, "of a later version": 1}) == config
    del content["flavour"]
    with pytest.raises(ValueError, match=r"^it does not say `flavour`$"):
        from_json(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", "ten"),
        ("epochs", True),
        ("epochs", 1.5),
        ("resume", 1),
        ("learning_rate", "fast"),
        ("run_dir", ["a"]),
        ("data_dir", "a\0b"),
        ("recipe", {}),
        ("model", None),
        ("image_size", 10**6),
        ("recipe", "of a later version"),
        ("learning_rate", float("nan")),
    ],
)
def test_a_damaged_value_is_named(run, field, value):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"^cannot resume: {path} is unreadable: .*`{field}`"):
        open_run(TrainConfig(resume=True, run_dir=run))
    assert path.read_bytes() == before
