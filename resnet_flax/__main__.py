"""The command ``resnet-flax``: ``resnet-flax train --epochs 10``, and the package's other programs.

It stands beside the package, since importing that takes seconds, in which a signal should end the
program at once, and quietly.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from pathlib import Path

from resnet_flax.machine.streams import flush_streams, open_streams

COMMANDS = {
    "train": "train a network",
    "predict": "tell what images show",
    "demo": "the same on a page in the browser",
    "evaluate": "score a trained network",
    "export": "write a network for programs without this package",
    "convert": "rewrite a PyTorch checkpoint",
    "summary": "list a network's layers, shapes and parameters",
}


def run(command: str) -> int:
    """Runs one of the programs on the command line's flags; returns its exit code."""
    open_streams()
    if threading.current_thread() is threading.main_thread():  # Python has signals in no other
        for each in (signal.SIGINT, signal.SIGTERM):  # there is nothing to lose yet
            signal.signal(each, lambda signum, frame: os._exit(128 + signum))
    program = importlib.import_module(f"resnet_flax.commands.{command}")
    from resnet_flax.commands.command_line import SIGNALLED, run_command

    code = run_command(program.main)
    # XLA, still compiling as Python ends, would fault seconds later.
    if code - SIGNALLED in (signal.SIGINT, signal.SIGTERM):
        os._exit(code)
    return code


def main() -> int:
    """Runs the program that the first argument names on the others."""
    open_streams()
    given = sys.argv[1] if len(sys.argv) > 1 else ""
    if given in COMMANDS:
        by_module = Path(sys.argv[0]).name == "__main__.py"
        program = "python -m resnet_flax" if by_module else "resnet-flax"  # in messages
        sys.argv = [f"{program} {given}", *sys.argv[2:]]
        return run(given)
    listed = "\n".join(f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items())
    if given in ("-h", "--help"):
        text = f"usage: resnet-flax COMMAND ...\n\n{listed}\n\nresnet-flax COMMAND --help says more"
        with contextlib.suppress(OSError):
            print(text)
        with contextlib.suppress(OSError):
            flush_streams()
        return 0
    wrong = f"unknown command {given!r}" if given else "no command"
    print(f"resnet-flax: error: {wrong}: choose from {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
