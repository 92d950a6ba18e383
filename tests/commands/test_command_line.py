import dataclasses
import re
import shlex
import signal
import subprocess
import sys

import pytest

from resnet_flax import Bottleneck, build_model
from resnet_flax.commands.command_line import flag, parse_config, run_command, with_flags
from resnet_flax.commands.train import main
from resnet_flax.errors import InputError, TrainingError
from resnet_flax.machine.interruption import Interrupted
from resnet_flax.runs.config import TrainConfig
from resnet_flax.training.recipes import RECIPES


def test_the_default_is_d2ls_recipe():
    config = parse_config([])
    assert config == TrainConfig()
    assert (config.epochs, config.batch_size, config.learning_rate) == (10, 256, 0.05)
    assert (config.image_size, config.model, config.recipe) == (96, "resnet18", "d2l")


def test_every_flag_reaches_its_field():
    config = parse_config(
        "--epochs 3 --batch-size 64 --learning-rate 0.1 --image-size 28 --model resnet50 "
        "--recipe d2l --seed 7 --dtype bfloat16 --data-dir a --run-dir b --resume "
        "--train-examples 100 --test-examples 50 --checkpoint-seconds 5 --deterministic "
        "--coordinator host:1 --num-processes 2 --process-id 1 --validation-examples 9 "
        "--dataset cifar10 --flavour torchvision --init c --freeze-stages 2 --tensorboard "
        "--follow-links --normalization imagenet --normalization-groups 4 "
        "--stream always --workers 3 --draft --skip-broken".split()
    )
    default = TrainConfig()
    unchanged = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) == getattr(default, field.name)
    ]
    assert unchanged == ["recipe"]
    assert (config.learning_rate, str(config.run_dir), config.resume) == (0.1, "b", True)


def test_a_flag_wins_over_the_recipe(monkeypatch):
    recipe = dataclasses.replace(RECIPES["d2l"], epochs=3, batch_size=8)
    monkeypatch.setitem(RECIPES, "d2l", recipe)
    config = parse_config(["--epochs", "2"])
    assert (config.epochs, config.batch_size) == (2, 8)


def test_a_recipe_sets_its_flags():
    config = parse_config(["--recipe", "fast", "--epochs", "2"])
    fast = RECIPES["fast"]
    assert (config.epochs, config.batch_size, config.image_size) == (2, fast.batch_size, 28)
    assert config.learning_rate == fast.learning_rate


def test_the_rate_of_the_recipe_imagenet_grows_with_the_batch_where_it_is_not_given():
    for arguments, batch_size, rate in (
        ("", 256, 0.1),
        ("--batch-size 1024", 1024, 0.4),
        ("--batch-size 64", 64, 0.025),
        ("--batch-size 1024 --learning-rate 0.3", 1024, 0.3),
        ("--learning-rate 0.3", 256, 0.3),
    ):
        config = parse_config(["--recipe", "imagenet", *arguments.split()])
        assert (config.batch_size, config.learning_rate) == (batch_size, rate)
        assert (config.dtype, config.normalization) == ("bfloat16", "imagenet")
        assert (config.image_size, config.epochs) == (224, 90)
    for recipe in ("d2l", "fast", "best", "finetune"):
        config = TrainConfig(recipe=recipe, batch_size=512)
        assert config.learning_rate == RECIPES[recipe].learning_rate
        assert (config.dtype, config.normalization) == ("float32", None)


def test_flags_win_over_the_recipe_imagenet_and_a_pretrained_network_normalises_as_it_did():
    config = TrainConfig(recipe="imagenet", dtype="float32", normalization="none")
    assert (config.dtype, config.normalization) == ("float32", "none")
    assert TrainConfig(recipe="imagenet", init="timm/resnet18").normalization is None


def test_a_recipe_has_a_network_by_name_and_model_and_flavour_always_win():
    for arguments, model, flavour, stages in (
        ("--recipe fast", "resnet8", "torchvision", (1, 1, 1)),
        ("--recipe best", "resnet14", "torchvision", (2, 2, 2)),
        ("--recipe finetune", "resnet18", "torchvision", (2, 2, 2, 2)),
        ("--recipe imagenet", "resnet50", "torchvision", (3, 4, 6, 3)),
        ("--recipe fast --model resnet50", "resnet50", "torchvision", (3, 4, 6, 3)),
        ("--recipe fast --flavour d2l", "resnet8", "d2l", (1, 1, 1)),
    ):
        config = parse_config(arguments.split())
        network = build_model(config.model, config.flavour)
        assert (config.model, config.flavour, network.stage_sizes) == (model, flavour, stages)
        assert network.use_bias == (flavour == "d2l")
        assert (network.block is Bottleneck) == (model == "resnet50")
        # As each was before it had a name.
        assert (network.stem == "small") == (model in ("resnet8", "resnet14"))


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        assert flag(field.name) in text
        assert " ".join(with_flags(field.metadata["help"]).split()) in text
    assert "`" not in text  # fields
    for default in ("10", "256", "0.05", "96", "resnet18", "d2l", "float32"):
        assert f"(default: {default})" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--epochs -3", "--epochs must be at least 1, not -3"),
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        ("--image-size 0", "--image-size must be at least 1, not 0"),
        ("--image-size 100000", "--image-size must be at most 1024, not 100000"),
        ("--batch-size 0", "--batch-size must be at least 1, not 0"),
        ("--learning-rate 0", "--learning-rate must be a positive number, not 0.0"),
        ("--learning-rate nan", "--learning-rate must be a positive number, not nan"),
        ("--seed -1", "--seed must be at least 0, not -1"),
        ("--train-examples 0", "--train-examples must be at least 1, not 0"),
        ("--freeze-stages -1", "--freeze-stages must be at least 0, not -1"),
        ("--normalization-groups 0", "--normalization-groups must be at least 1, not 0"),
        (
            "--normalization-groups 3",
            "--batch-size must be a multiple of --normalization-groups, 3, not 256",
        ),
    ],
)
def test_values_out_of_range_name_the_flag(arguments, words):
    with pytest.raises(InputError) as error:
        parse_config(arguments.split())
    assert with_flags(str(error.value)) == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs?"),
        ("--learningrate 3", "did you mean --learning-rate?"),
        ("--epochs ten", "argument --epochs: invalid int value: 'ten'; see --help"),
        ("--epochs", "argument --epochs: expected one argument; see --help"),
        ("--model resnet19", "invalid choice: 'resnet19' (choose from"),
        ("--dtype int8", "invalid choice: 'int8' (choose from"),
        ("zzz", "unrecognized arguments: zzz; see --help"),
    ],
)
def test_malformed_flags_end_in_one_line_and_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(arguments.split())
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (InputError("no such thing"), 2, "error: no such thing"),
        (TrainingError("the loss is nan"), 1, "failed: the loss is nan"),
        (OSError(28, "No space left", "a.png"), 1, "failed: [Errno 28] No space left: 'a.png'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(signal.SIGINT), 130, "interrupted: nothing was lost"),
        (Interrupted(signal.SIGTERM, "epoch 1, step 2 is saved"), 143, "step 2 is saved"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (None, 0, ""),
    ],
)
def test_exit_codes(raised, code, words, capsys):
    def command():
        if raised:
            raise raised

    assert run_command(command) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == bool(words)


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (
            "a b/train.py --epochs 3 --run-dir r",
            "python 'a b/train.py' --resume --run-dir r",
        ),
        ("resnet-flax train --seed 1", r"resnet-flax train --resume --run-dir runs/[\d-]+"),
        (
            "train.py --coordinator host:1 --num-processes 2 --process-id 0 --run-dir r",
            "python train.py --resume --run-dir r --coordinator host:1 --num-processes 2 "
            "--process-id 0",
        ),
    ],
)
def test_how_to_go_on_is_a_short_command_that_works(given, again, monkeypatch, capsys):
    def interrupted(config, **_):
        raise Interrupted(signal.SIGTERM, "epoch 1, step 2 is saved")

    program, *flags = given.partition(" --")[0], *shlex.split("--" + given.partition(" --")[2])
    monkeypatch.setattr(sys, "argv", [program, *flags])
    monkeypatch.setattr(sys.modules["resnet_flax.commands.train"], "train", interrupted)
    assert run_command(main) == 143
    assert re.fullmatch(
        f"{program.removeprefix('a b/')}: interrupted: epoch 1, step 2 is saved; go on with: "
        f"{again}\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_nothing_is_said_after_a_process_that_ended_at_once(method):
    """Python's start methods of processes: the default differs by system and version."""
    program = f"""
import logging, multiprocessing, os
from resnet_flax.commands.command_line import run_command
multiprocessing.set_start_method({method!r})
run_command(lambda: logging.getLogger("resnet_flax").info("said"))
os._exit(0)"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "said\n")


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_the_dataclass_refuses_unknown_choices():
    with pytest.raises(InputError, match="unknown `recipe` 'x': choose from d2l"):
        TrainConfig(recipe="x")
