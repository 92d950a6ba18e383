"""A thousand bad inputs: each ends in one clear line, with the right exit code."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from resnet_flax.commands.command_line import flag, parse_config, run_command
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.run_folder import open_run
from tests.runs.test_checkpoints import checkpoints, saved_run
from tests.support.small_run import checkpoints_of, new_state, random_data

FLAGS = [flag(name) for name in TrainConfig.__dataclass_fields__]
# What a shell can pass: any text without a zero byte, and numbers of every kind.
WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["0", "-1", "1e999", "nan", "resnet18", "d2l", "float32", "--", "-", "localhost:1"]
    ),
)
ARGUMENTS = st.lists(st.one_of(st.sampled_from(FLAGS), WORDS), min_size=1, max_size=8)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner),
        st.dictionaries(st.sampled_from(list(TrainConfig.__dataclass_fields__)), inner),
    ),
)
FIXTURES = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def outcome(command: Callable[[], object]) -> tuple[int | str | None, str]:
    """The exit code, and what is on standard error; anything but an exit is a bug."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code: int | str | None = run_command(lambda: (command(), None)[1])
        except SystemExit as stop:
            code = stop.code
    return code, said.getvalue()


def check(code: int | str | None, said: str) -> None:
    assert code in (0, 2), said
    assert said.count("\n") == (code == 2), said
    assert "Traceback" not in said


@settings(max_examples=600, **FIXTURES)
@given(arguments=ARGUMENTS)
@example(arguments=[""])
@example(arguments=["line\nbreak"])
@example(arguments=["--run-dir", "line\nbreak", "--epochs", "0"])
def test_flags(arguments):
    check(*outcome(lambda: parse_config(arguments)))


@settings(max_examples=300, **FIXTURES)
@given(content=st.one_of(st.binary(), JSON.map(lambda value: json.dumps(value).encode())))
def test_configurations_of_other_runs(content, tmp_path):
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "config.json").write_bytes(content)
    config = TrainConfig(run_dir=run, resume=True)
    code, said = outcome(lambda: open_run(config))
    check(code, said)
    assert code == 2  # nothing that is made up is this run's configuration
    assert (run / "config.json").read_bytes() == content
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_a_configuration_nested_too_deeply(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    check(*outcome(lambda: open_run(TrainConfig(run_dir=tmp_path, resume=True))))


def test_a_path_that_is_too_long():
    code, said = outcome(lambda: open_run(TrainConfig(run_dir=Path("x" * 5000))))
    check(code, said)
    assert "cannot write the run folder" in said


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    config, _ = saved_run(run, 2)
    return run, config, new_state(random_data(2))


@settings(max_examples=100, **FIXTURES)
@given(choice=st.data())
def test_damaged_checkpoints(choice, whole_run, tmp_path):
    whole, _, state = whole_run
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    for folder in checkpoints(run):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        file = choice.draw(st.sampled_from(files))
        file.write_bytes(choice.draw(st.binary(max_size=200)) + b"!")
    before = sorted(run.rglob("*"))

    def resume() -> None:
        with checkpoints_of(TrainConfig(run_dir=run, resume=True)) as folder:
            folder.restore(state)

    code, error = outcome(resume)
    assert code == 2
    *said, last = error.splitlines()
    assert "all its checkpoints are damaged" in last
    assert len(said) == 2
    assert sorted(run.rglob("*")) == before
