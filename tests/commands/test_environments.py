"""The commands where people run them: with no screen, reader, wide alphabet or main thread."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from resnet_flax import from_pretrained
from resnet_flax.__main__ import main, run
from resnet_flax.commands.command_line import run_command
from resnet_flax.commands.predict import main as predict_main
from resnet_flax.commands.train import main as train_main
from resnet_flax.errors import InputError
from resnet_flax.inference import Prediction
from resnet_flax.runs.train import Run
from tests.support.environment import without_devices
from tests.support.image_files import write_classes

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers():
    """Those of signals, as they were."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.slow
def test_without_an_error_stream_it_trains_quietly(tmp_path):
    write_classes(tmp_path / "pets")
    flags = "--recipe fast --image-size 8 --batch-size 4 --epochs 1 --dataset folder:pets"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} {ROOT}/train.py {flags} --run-dir run 2>&-"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.returncode == 0
    assert process.stdout.endswith(" examples/sec on cpu\n")
    assert (tmp_path / "run" / "README.md").exists()


@pytest.mark.parametrize("printed", ["a line", "many lines\n" * 10_000])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_it_ends_quietly_when_nobody_reads(printed, name, monkeypatch, capsys):
    with closed_pipe() as stream:
        monkeypatch.setattr(sys, name, stream)
        assert run_command(lambda: print(printed, file=stream)) == 141
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("arguments", [["--help"], ["summary", "--help"]])
def test_help_ends_quietly_when_nobody_reads(arguments, monkeypatch, capsys):
    with closed_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["resnet-flax", *arguments])
        assert main() in (0, 141)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_as_output_is_one_line(monkeypatch, capsys):
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_command(lambda: print("a line")) == 1
    assert capsys.readouterr().err.endswith("failed: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_answers_in_an_alphabet_that_the_terminal_lacks(flags, monkeypatch):
    answer = Prediction("猫.png", False, [("猫", 0.75), ("狗", 0.25)])
    monkeypatch.setattr(sys.modules[predict_main.__module__], "predict", lambda *_: [answer])
    monkeypatch.setattr(sys.modules[predict_main.__module__], "keep_compiled_programs", int)
    monkeypatch.setattr(sys, "argv", ["resnet-flax", "predict", "run", "a.png", *flags])
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main() == 0
    written = stream.buffer.getvalue().decode()
    assert r"\u732b" in written
    assert flags or written.rstrip() == r"\u732b.png  \u732b 75.0%  \u72d7 25.0%"


def test_a_platform_that_is_not_there_is_one_line():
    process = subprocess.run(
        [sys.executable, "-m", "resnet_flax", "summary", "--model", "resnet8"],
        env={**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(
        "python -m resnet_flax summary: error: JAX_PLATFORMS is 'cuda', which JAX cannot use here"
    )
    assert process.stderr.count("\n") == 1


def test_a_platform_that_is_not_there_is_not_the_folders_fault(shared_run, monkeypatch):
    without_devices(monkeypatch, "cuda", "")
    with pytest.raises(InputError, match=r"^JAX_PLATFORMS is 'cuda'"):
        from_pretrained(shared_run.folder)


def test_the_command_trains_in_a_thread(monkeypatch, tmp_path):
    finished = Run(None, {}, [], None)
    monkeypatch.setattr(sys.modules[train_main.__module__], "train", lambda *_, **__: finished)
    monkeypatch.setattr(sys, "argv", ["train.py", "--run-dir", str(tmp_path)])
    found = []
    thread = threading.Thread(target=lambda: found.append(run("train")))
    thread.start()
    thread.join()
    assert found == [0]
