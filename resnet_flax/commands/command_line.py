"""Flags from a configuration's fields, the log, and errors as one line with the right exit code.

The library speaks of fields, as in `batch_size`; here they become flags, as in --batch-size.
"""

import argparse
import dataclasses
import difflib
import logging
import re
import shlex
import signal
import sys
import threading
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from resnet_flax.errors import InputError, TrainingError
from resnet_flax.machine.interruption import Interrupted
from resnet_flax.machine.streams import flush_streams
from resnet_flax.runs.config import TrainConfig
from resnet_flax.training.recipes import RECIPES

NETWORK = "folder of a finished run or a network, or a name such as timm/resnet18.a1_in1k"
BAD_INPUT, FAILED, SIGNALLED = 2, 1, 128
SIGPIPE = 13  # the signal module of Windows has none
LONGEST_MESSAGE = 1500
FIELDS = [*(field.name for field in dataclasses.fields(TrainConfig)), "part"]  # of `convert`


class OneLineParser(argparse.ArgumentParser):
    """An `argparse` parser whose errors are one line, with the flag that was probably meant.

    Messages call the program ``prog``, unless ``resnet-flax`` started it.
    """

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        by_command = sys.argv[0].startswith("resnet-flax ")
        super().__init__(None if by_command else prog, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        message = one_line(message)
        word = message.rpartition("unrecognized arguments: ")[2].partition(" ")[0]
        near = difflib.get_close_matches(word, self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near and "unrecognized" in message else "see --help"
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}; {hint}\n")


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Reads a `TrainConfig` from the command line.

    Raises:
        InputError: when a value is out of range.
        SystemExit: for ``--help`` (code 0) and for unknown or malformed flags (code 2).
    """
    parser = OneLineParser(
        description="Trains a residual network; without flags as D2L does on Fashion-MNIST.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        text = with_flags(field.metadata["help"])
        if hints[field.name] is bool:
            parser.add_argument(flag(field.name), action="store_true", help=text)
            continue
        default = RECIPES["d2l"].defaults().get(field.name, field.default)
        if default is not None:
            text += f" (default: {default})"
        kind = (typing.get_args(hints[field.name]) or (hints[field.name],))[0]  # of `int | None`
        choices = field.metadata.get("choices")
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(
            flag(field.name), type=kind, choices=choices, metavar=metavar, help=text
        )
    return TrainConfig(**vars(parser.parse_args(arguments)))


def flag(name: str) -> str:
    """The flag of a field: ``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


def with_flags(text: str) -> str:
    """Replaces what names a field of `TrainConfig`, in backticks, by its flag."""
    return re.sub(rf"`({'|'.join(FIELDS)})`", lambda match: flag(match[1]), text)


def one_line(text: str) -> str:
    """A message with flags, in a line, and with escapes for what would steer a terminal."""
    line = " ".join(with_flags(text).split())[:LONGEST_MESSAGE]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def how_to_go_on(config: TrainConfig) -> str:
    """The command that resumes a run: which it is, and with which other processes."""
    program = sys.argv[0]
    program = f"python {shlex.quote(program)}" if program.endswith(".py") else program
    fields = ("run_dir", "coordinator", "num_processes", "process_id")
    given = {flag(name): getattr(config, name) for name in fields}
    words = [str(word) for pair in given.items() if pair[1] is not None for word in pair]
    return f"{program} --resume {shlex.join(words)}"


class TerminalHandler(logging.Handler):
    """Prints what the library logs, a line each, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        if sys.stderr is not None:
            tqdm.write(one_line(record.getMessage()), file=sys.stderr)


def run_command(command: Callable[[], None]) -> int:
    """Runs a program's body; returns its exit code, with errors printed as one line on stderr."""
    logger, handler = logging.getLogger("resnet_flax"), TerminalHandler()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False  # Abseil's handler would say it again
    # tqdm's own lock serves many processes: where Python forks none (3.14, macOS) it starts a
    # watcher, which says after an interrupted run that a semaphore leaked.
    tqdm.set_lock(threading.RLock())
    # A cache that cannot be written is done without, whosever it is.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Error .* persistent compilation cache")
    try:
        try:
            return _code_of(command)
        finally:
            flush_streams()  # of --help too, which raises SystemExit
    except BrokenPipeError:  # as in `| head -1`
        return SIGNALLED + SIGPIPE
    except OSError as error:
        return _report(f"failed: {error}", FAILED)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _code_of(command: Callable[[], None]) -> int:
    try:
        command()
    except InputError as error:
        return _report(f"error: {error}", BAD_INPUT)
    except BrokenPipeError:
        raise
    except (TrainingError, OSError) as error:  # such as a full disk, wherever it shows
        return _report(f"failed: {error}", FAILED)
    except Interrupted as stop:
        return _report(f"interrupted: {stop.saved or 'nothing was lost'}", SIGNALLED + stop.signum)
    except KeyboardInterrupt:
        return _report("interrupted", SIGNALLED + signal.SIGINT)
    return 0


def _report(message: str, code: int) -> int:
    print(Path(sys.argv[0]).name + ":", one_line(message), file=sys.stderr)
    return code
