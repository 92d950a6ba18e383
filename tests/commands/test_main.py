"""The command `resnet-flax`, and the wheel that brings it."""

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from resnet_flax import __main__ as resnet_flax_command
from resnet_flax.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]


def command(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs it as its script does."""
    start = "import sys; from resnet_flax.__main__ import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def arguments(monkeypatch):
    def set_arguments(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/resnet-flax", *arguments])

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield set_arguments
    for each, handler in before.items():
        signal.signal(each, handler)


def test_help_lists_the_programs(arguments, capsys):
    arguments("--help")
    assert main() == 0
    text = capsys.readouterr().out
    for name, purpose in COMMANDS.items():
        assert f"  {name:<10}{purpose}\n" in text


@pytest.mark.parametrize("given", [[], ["trian"], ["--epochs", "3"], ["../x"]])
def test_anything_else_is_one_line(given, arguments, capsys):
    arguments(*given)
    assert main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("resnet-flax: error: ")
    assert captured.err.endswith("choose from " + ", ".join(COMMANDS) + "\n")
    assert captured.err.count("\n") == 1


def test_the_other_arguments_are_the_programs(arguments, monkeypatch):
    arguments("train", "--epochs", "3")
    seen = []
    monkeypatch.setattr(resnet_flax_command, "run", lambda name: seen.append((name, sys.argv)) or 7)
    assert main() == 7
    assert seen == [("train", ["resnet-flax train", "--epochs", "3"])]


def test_a_program_runs(tmp_path):
    done = command("summary", "--model", "resnet18", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "11,178,378" in done.stdout


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            ["summary", "--modle", "x"],
            "resnet-flax summary: error: unrecognized arguments: --modle",
        ),
        (["summary", "--classes", "0"], "resnet-flax summary: error: --classes must be at least 1"),
        (["convert"], "resnet-flax convert: error: the following arguments are required: IN, OUT"),
        (
            ["train", "--epochs", "0"],
            "resnet-flax train: error: --epochs must be at least 1, not 0",
        ),
    ],
)
def test_errors_name_the_command(given, line, arguments, capsys):
    arguments(*given)
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_a_signal_in_the_imports_ends_it_quietly(tmp_path):
    start = "import resnet_flax.__main__ as c; print(flush=True); c.run('train')"
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode == 130


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since the build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    names = ("pyproject.toml", "README.md", "LICENSE", "resnet_flax")
    for name in names:
        (source / name).symlink_to(ROOT / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_whole_package(wheel):
    here, there = (
        {
            path.relative_to(root)
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        for root in (ROOT / "resnet_flax", wheel / "resnet_flax")
    )
    assert there == here
    assert {Path("py.typed"), Path("machine/__init__.pyi")} <= there
    (information,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {
        "resnet_flax",
        information.name,
    }


def test_the_wheel_works_by_itself(wheel, tmp_path):
    (information,) = wheel.glob("*.dist-info")
    (entry,) = importlib.metadata.PathDistribution(information).entry_points
    assert (entry.name, entry.value) == ("resnet-flax", "resnet_flax.__main__:main")
    start = (
        f"import sys; sys.path[:0] = [{str(wheel)!r}]; import resnet_flax; "
        f"assert resnet_flax.__file__.startswith({str(wheel)!r}); "
        "from resnet_flax.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", start, "train", "--dataset", "folder:absent"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("resnet-flax train: error: cannot read the images in absent: No")
    assert list(tmp_path.iterdir()) == []
