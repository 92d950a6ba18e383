import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import pytest

from resnet_flax.errors import InputError, TrainingError
from resnet_flax.runs.config import TrainConfig, as_json
from resnet_flax.runs.run_folder import open_run, resolve, write_metrics
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.position import EpochResult, Position
from tests.support.small_run import checkpoints_of, new_state, random_data, run_epoch

RESULT = EpochResult(1, 0.5, 0.8, 0.7, 100.0, 2.0)
MIDDLE = Position([RESULT], 3, Metrics(jnp.float32(1 / 3), jnp.int32(5), jnp.int32(24)), 0.1)


def saved_run(path: Path, positions: int = 1) -> tuple[TrainConfig, list]:
    """A run folder with a checkpoint for each of several steps; returns the states too."""
    data = random_data(16)
    state, states = new_state(data), []
    with checkpoints_of(TrainConfig(run_dir=path)) as folder:
        for number in range(positions):
            state, _ = run_epoch(state, data, 8)
            states.append(jax.tree.map(jnp.copy, state))
            folder.save(state, MIDDLE.replace(steps=number))
    return TrainConfig(run_dir=path, resume=True), states


def checkpoints(path: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path / "checkpoints").iterdir(), key=lambda folder: int(folder.name))


def largest_file(folder: Path) -> Path:
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    config, (state,) = saved_run(tmp_path / "run")
    fresh = new_state(random_data(16), seed=9)
    with checkpoints_of(config) as folder:
        restored, position = folder.restore(fresh)
    assert position == MIDDLE.replace(steps=0)
    chex.assert_trees_all_equal(jax.tree.leaves(restored), jax.tree.leaves(state))
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)


def test_more_epochs_may_be_asked_for(tmp_path):
    saved_run(tmp_path)
    with checkpoints_of(TrainConfig(run_dir=tmp_path, resume=True, epochs=12)):
        assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 12


def test_metrics_file_has_one_line_an_epoch(tmp_path):
    write_metrics(tmp_path, [RESULT])
    write_metrics(tmp_path, [RESULT, RESULT._replace(epoch=2)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert list(rows[0]) == list(RESULT._fields)


def test_the_latest_and_the_best_are_kept(tmp_path):
    state = new_state(random_data(2))
    results = []
    with checkpoints_of(TrainConfig(run_dir=tmp_path)) as folder:
        for epoch, accuracy in enumerate((0.5, 0.9, 0.6, 0.7, 0.8, 0.7), 1):
            folder.save(state.replace(step=10 * epoch), Position(list(results), 1))
            results.append(RESULT._replace(epoch=epoch, test_acc=accuracy))
            folder.save(state.replace(step=10 * epoch), Position(list(results)), accuracy)
    assert [path.name for path in checkpoints(tmp_path)] == ["22", "55", "65", "66"]


def test_a_folder_without_checkpoint_starts_anew(tmp_path):
    with checkpoints_of(TrainConfig(run_dir=tmp_path)):
        pass
    state = new_state(random_data(2))
    with checkpoints_of(TrainConfig(run_dir=tmp_path, resume=True)) as folder:
        same, position = folder.restore(state)
    chex.assert_trees_all_equal(same.params, state.params)
    assert position == Position()


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "removed", "position", "emptied", "unfinished"]
)
def test_the_newest_whole_checkpoint_is_taken(tmp_path, damage, caplog):
    config, states = saved_run(tmp_path, 3)
    newest = checkpoints(tmp_path)[-1]
    file = largest_file(newest)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "removed":
        file.unlink()
    elif damage == "emptied":
        shutil.rmtree(newest / "state")
    elif damage == "unfinished":
        (newest / "SHA256SUMS").unlink()
    else:
        file = newest / "position" / "metadata"
        file.write_text(file.read_text().replace('"correct": 5', '"correct": 6'))
    with checkpoints_of(config) as folder:
        restored, position = folder.restore(new_state(random_data(16), seed=9))
        chex.assert_trees_all_equal(restored.params, states[1].params)
        assert position.steps == 1
        folder.save(states[2], MIDDLE)  # the damaged one is not in its way
    assert len(caplog.messages) == 1
    state = "unfinished" if damage == "unfinished" else "damaged"
    assert f"checkpoint {newest.name} is {state}" in caplog.messages[0]
    with checkpoints_of(config) as folder:
        restored, _ = folder.restore(new_state(random_data(16), seed=9))
        chex.assert_trees_all_equal(restored.params, states[2].params)


def test_it_does_not_start_anew_when_all_are_damaged(tmp_path, caplog):
    config, _ = saved_run(tmp_path, 2)
    for each in checkpoints(tmp_path):
        largest_file(each).write_bytes(b"")
    with (
        checkpoints_of(config) as folder,
        pytest.raises(InputError, match="all its checkpoints are damaged"),
    ):
        folder.restore(new_state(random_data(2)))
    assert len(caplog.messages) == len(checkpoints(tmp_path)) == 2


def test_a_first_checkpoint_that_was_not_finished_is_as_none(tmp_path, caplog):
    config, _ = saved_run(tmp_path)
    (checkpoints(tmp_path)[0] / "SHA256SUMS").unlink()
    with checkpoints_of(config) as folder:
        assert folder.restore(new_state(random_data(2)))[1] == Position()
    assert caplog.messages == ["checkpoint 3 is unfinished"]
    assert checkpoints(tmp_path) == []


def test_the_same_place_is_saved_once(tmp_path):
    config, (state,) = saved_run(tmp_path)
    with checkpoints_of(config) as folder:
        folder.save(state, MIDDLE.replace(steps=0))
        folder.save(state, MIDDLE.replace(steps=0))
    assert len(checkpoints(tmp_path)) == 1


def test_other_arrays_are_refused_before_they_are_read(tmp_path, caplog):
    config, _ = saved_run(tmp_path)
    other = new_state(random_data(2))
    params = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape, 2)), other.params)
    with checkpoints_of(config) as folder, pytest.raises(InputError):
        folder.restore(other.replace(params=params))
    assert "it holds other arrays" in caplog.messages[0]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    config, _ = saved_run(tmp_path)
    half = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "data").write_text("half")
    with checkpoints_of(config) as folder:
        _, position = folder.restore(new_state(random_data(2)))
    assert position.results == [RESULT]
    assert not half.exists()


def test_what_cannot_be_written_is_told(tmp_path, monkeypatch):
    config, states = saved_run(tmp_path, 2)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    told = "no space left on the device; the earlier checkpoints are whole"
    with checkpoints_of(config) as folder, monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        folder.save(states[1].replace(step=7), MIDDLE)
        with pytest.raises(TrainingError, match=told):
            folder.save(states[1].replace(step=8), MIDDLE)
    with checkpoints_of(config) as folder:
        assert folder.restore(states[0])[1].steps == 1


def test_a_disk_that_is_full_from_the_start_leaves_none_to_speak_of(tmp_path, monkeypatch):
    state = new_state(random_data(2))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with checkpoints_of(TrainConfig(run_dir=tmp_path)) as folder:
        folder.save(state, MIDDLE)
        with pytest.raises(TrainingError, match=r"no space left on the device: mend it, and go on"):
            folder.finish()


def test_a_new_run_does_not_wait_for_orbax(tmp_path):
    program = (
        "import sys; from pathlib import Path; import resnet_flax.runs.train;"
        "from resnet_flax.runs.checkpoints import Checkpoints;"
        "from tests.support.small_run import new_state, random_data;"
        f"folder = Checkpoints(Path({str(tmp_path)!r})); folder.restore(new_state(random_data(2)));"
        "assert not any(name.startswith('orbax') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_run_is_not_overwritten(tmp_path):
    open_run(TrainConfig(run_dir=tmp_path))
    with pytest.raises(InputError, match="holds a run already: add `resume`"):
        open_run(TrainConfig(run_dir=tmp_path))


def test_a_run_from_before_links_were_followed_is_resumed(tmp_path):
    open_run(TrainConfig(run_dir=tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["follow_links"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_run(TrainConfig(run_dir=tmp_path, resume=True, follow_links=True)) == tmp_path


def test_another_run_is_not_resumed(tmp_path):
    open_run(TrainConfig(run_dir=tmp_path))
    before = (tmp_path / "config.json").read_text()
    other = TrainConfig(run_dir=tmp_path, resume=True, seed=1, image_size=28)
    with pytest.raises(InputError) as error:
        open_run(other)
    assert "`image_size` 96 there, 28 here; `seed` 0 there, 1 here" in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


def test_nothing_to_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no run in runs/"):
        open_run(TrainConfig(resume=True))
    with pytest.raises(InputError, match="missing holds no run"):
        open_run(TrainConfig(resume=True, run_dir=Path("missing")))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_configuration_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot resume: .*config.json is unreadable"):
        open_run(TrainConfig(run_dir=tmp_path, resume=True))


def test_the_newest_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = open_run(TrainConfig(run_dir=Path("runs/a")))
    open_run(TrainConfig(run_dir=Path("runs/b"), resume=False))
    os.utime(first / "config.json", (2**31, 2**31))  # the clock of files is slower than this test
    assert open_run(TrainConfig(resume=True)) == Path("runs/a")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"cannot write the run folder .*file/run: Not a directory"
    ):
        open_run(TrainConfig(run_dir=tmp_path / "file" / "run"))


@pytest.mark.parametrize("recipe", ["d2l", "fast", "best"])
def test_a_run_of_version_0_1_0_is_resumed(tmp_path, recipe):
    # It wrote the flags' defaults, whatever network a recipe trained.
    now = TrainConfig(run_dir=tmp_path, recipe=recipe, resume=True)
    saved = {**as_json(now), "resume": False, "model": "resnet18", "flavour": "d2l"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert resolve(TrainConfig(run_dir=tmp_path, resume=True)) == now  # nothing is given again
    assert open_run(now) == tmp_path
    other = TrainConfig(run_dir=tmp_path, recipe=recipe, resume=True, model="resnet50")
    with pytest.raises(InputError, match=r"`model` .* there, 'resnet50' here"):
        open_run(other)
