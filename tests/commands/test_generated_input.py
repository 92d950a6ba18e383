"""Bad command lines, configurations, run folders and environments, drawn from seeds.

Each starts from what works, and one or two things in it go wrong. It ends in one clear line and
exit code 2, with nothing written; or, where what is wrong does no harm, gets as far as computing.
"""

import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import jax
import pytest

from resnet_flax import TrainConfig, build_model
from resnet_flax.__main__ import COMMANDS as PROGRAMS
from resnet_flax.__main__ import main
from resnet_flax.inference.export import FORMATS
from resnet_flax.inference.pretrained import save_weights
from resnet_flax.nn.resnet import ResNet
from resnet_flax.runs.run_folder import open_run
from resnet_flax.weights import save_safetensors, to_torch
from tests.support.environment import without_devices, without_home
from tests.support.finished_run import new_network, new_variables
from tests.support.image_files import random_image, write_classes
from tests.support.state_dicts import random_variables

CLASSES = ("cats", "dogs")
# Each works in the folder `home` below.
COMMANDS = {
    "train": "--recipe fast --epochs 1 --image-size 8 --batch-size 4 --dataset folder:pets "
    "--init net.safetensors --freeze-stages 1 --run-dir new",
    "train --resume": "--resume --run-dir run",
    "predict": "run a.png --json",
    "evaluate": "run --dataset folder:pets --test-examples 2",
    "export": "run --to stablehlo --output out",
    "convert": "net.safetensors out.safetensors --model resnet8 --to huggingface",
    "summary": "--model resnet8 --image-size 28 --channels 1 --classes 10",
}
CONFIG, WEIGHTS = "run/config.json", "run/model.safetensors"
NET, PICTURE = "net.safetensors", "pets/cats/00.png"
# What they read.
READ = {
    "train": (NET, PICTURE),
    "train --resume": (CONFIG,),
    "predict": (CONFIG, WEIGHTS, "a.png"),
    "evaluate": (CONFIG, WEIGHTS, PICTURE),
    "export": (CONFIG, WEIGHTS),
    "convert": (NET,),
    "summary": (),
}
WORDS = (
    *("", " ", "-", "--", "-1", "0", "1e999", "nan", "9" * 30, "1.5", "True", "None", "a b"),
    *("line\nbreak", "\x1b[31mred", "猫", "\udcff", "x" * 300, "x" * 5000, "~", "~nobody/at/all"),
    *("gone", "gone/deeper", "pets", "a.png", "a.png/x", "run", "empty", "."),
    *("folder:", "folder:gone", "folder:a.png", "folder:empty", "folder:~nobody/at/all"),
    *("cifar1O", "../x", "host:1", "--epochs", "--seed", "--json", "--no-such-flag", "-x"),
)
JUNK = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        10**30,
        10**400,
        float("nan"),
        float("inf"),
        "",
        "x",
        "a\0b",
        "\x1b[31m",
    ),
    *([], {}, [1, 2], ["a"], {"a": 1}, "x" * 5000, "folder:gone", "../x", "~nobody/x"),
)


PAGE, POINTER = b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where each of the `COMMANDS` works."""
    folder = tmp_path_factory.mktemp("generated") / "home"
    write_classes(folder / "pets", CLASSES, count=8)
    random_image(1).save(folder / "a.png")
    (folder / "empty").mkdir()
    flags = {"dataset": "folder:pets", "recipe": "fast", "batch_size": 4, "image_size": 8}
    model = ResNet((1, 1), channels=8, stem="small", num_classes=2)
    network = new_network(model, classes=CLASSES, image_shape=(8, 8, 3), image_size=8)
    run = open_run(TrainConfig(run_dir=folder / "run", **flags), network.as_json())
    save_weights(run, network, new_variables(network))
    net = build_model("resnet8", "torchvision", num_classes=2)
    tensors = to_torch(net, random_variables(net, 3), "torchvision")
    save_safetensors(folder / NET, tensors)
    return folder


class ReachedError(Exception):
    """The command has read all that it was given, and would compute."""


@pytest.fixture
def without_computing(monkeypatch):
    """The commands as they are, but for what takes long, and for what outlives them."""

    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    for program in PROGRAMS:
        __import__(f"resnet_flax.commands.{program}")
    for module, name in (
        ("runs.train", "create_train_state"),
        ("inference.predict", "compute_logits"),
        ("inference.evaluate", "compute_logits"),
    ):
        monkeypatch.setattr(sys.modules[f"resnet_flax.{module}"], name, reached)
    for name in FORMATS:
        monkeypatch.setitem(FORMATS, name, reached)
    monkeypatch.setattr(sys.modules["resnet_flax.machine.runtime"], "keep_memory", int)
    monkeypatch.setattr(gc, "freeze", int)
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in settings}
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    for each, handler in handlers.items():
        signal.signal(each, handler)


def spoil_arguments(draw: random.Random, words: list[str]) -> list[str]:
    words = list(words)
    for _ in range(draw.choice((1, 1, 2))):
        place, kind = draw.randrange(len(words) + 1), draw.randrange(3)
        words[place : place + (kind > 0)] = [] if kind == 1 else [draw.choice(WORDS)]
    return words


def spoil_config(draw: random.Random) -> None:
    path = Path(CONFIG)
    content = json.loads(path.read_text())
    for _ in range(draw.choice((1, 1, 2))):
        table = draw.choice((content, content["network"]))
        if isinstance(table, dict):
            name = draw.choice(sorted(table))
            table[name] = draw.choice(JUNK)
            if draw.randrange(4) == 0:
                del table[name]
            if "network" not in content or not content["network"]:
                break
    path.write_text(json.dumps(content))


def spoil_file(draw: random.Random, path: Path) -> None:
    content = path.read_bytes()
    place = draw.randrange(len(content))
    spoilt = (
        *(b"", b"{}", b"[" * 100_000, PAGE, POINTER, content[:place], content + b"}"),
        content[:place] + draw.randbytes(3) + content[place:],
    )
    path.unlink()
    kind = draw.randrange(12)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(draw.choice(("gone", path.name, "../a.png", "/etc/hostname")))
    elif kind > 2:  # else it is gone
        path.write_bytes(draw.choice(spoilt))


def spoil_environment(draw: random.Random, patch: pytest.MonkeyPatch) -> None:
    kind = draw.randrange(5)
    if kind == 0:
        without_home(patch)
    elif kind == 1:
        said = draw.choice(("", "Unable to initialize backend 'cuda':\n no driver"))
        without_devices(patch, draw.choice(("cuda", "gpu", "tpu,cpu", "x", "")), said)
    elif kind == 2:
        names = ("XDG_CACHE_HOME", "TMPDIR", "TFDS_DATA_DIR", "HOME", "MPLCONFIGDIR")
        patch.setenv(draw.choice(names), draw.choice(("a.png", "/proc/1/x", "x" * 5000, "", "~x")))
    elif kind == 3:
        patch.setenv("SLURM_NTASKS", draw.choice(("x", "-1", "2", "1.5", "")))
    else:
        stream = io.TextIOWrapper(io.BytesIO(), "ascii")
        patch.setattr(contextlib, "redirect_stdout", lambda _: contextlib.nullcontext())
        patch.setattr(sys, "stdout", stream)


def outcome(arguments: list[str]) -> tuple[int | str | None, str]:
    """The exit code, and what is on standard error; anything but an exit is a bug."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["resnet-flax", *arguments])
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                return main(), said.getvalue()
            except SystemExit as stop:
                return stop.code, said.getvalue()
            except ReachedError:
                return 0, said.getvalue()


def tree() -> dict[Path, tuple[int, int]]:
    found = {path: path.lstat() for path in Path().rglob("*")}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def check(name: str, arguments: list[str], case: str) -> None:
    before = tree()
    try:
        code, said = outcome([name, *arguments])
    except Exception as error:
        error.add_note(f"{case}: {name} {arguments}")
        raise
    case = f"{case}: {name} {arguments}: {said}"
    assert code in (0, 2), case
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith(f"resnet-flax {name}: error: ")]
    assert errors == lines[-1:] * (code == 2), case
    assert all(map(str.isprintable, lines)), case
    assert code == 0 or tree() == before, case


@pytest.mark.parametrize("count", [56, pytest.param(560, marks=pytest.mark.slow)])
def test_bad_input_of_every_kind(count, home, tmp_path, without_computing, monkeypatch):
    for seed in range(count):
        draw = random.Random(seed)
        folder = shutil.copytree(home, tmp_path / str(seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            command = draw.choice(sorted(COMMANDS))
            arguments = COMMANDS[command].split()
            match seed % 5:
                case 0:
                    spoil_environment(draw, patch)
                case 1 if CONFIG in READ[command]:
                    spoil_config(draw)
                case 2 if READ[command]:
                    spoil_file(draw, Path(draw.choice(READ[command])))
                case _:
                    arguments = spoil_arguments(draw, arguments)
            check(command.split()[0], arguments, f"seed {seed}")
        shutil.rmtree(folder)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_they_start_from_works(command, home, without_computing, monkeypatch):
    monkeypatch.chdir(home)
    name, arguments = command.split()[0], COMMANDS[command].split()
    assert outcome([name, *arguments])[0] == 0
