"""Standard streams that are closed, that cannot encode what is printed, or that nobody reads."""

import io
import os
import sys

FAILING = ("strict", "surrogateescape")  # where an alphabet lacks a letter


def open_streams() -> None:
    """Gives a closed output stream the null device, and escapes to one of a small alphabet.

    A service or ``2>&-`` closes a stream: Python then has None in its place, and the next file that
    is opened gets its number, and so what the C libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in FAILING:
            stream.reconfigure(errors="backslashreplace")


def flush_streams() -> None:
    """Writes out what was printed.

    Raises:
        OSError: when that cannot be done, as where nobody reads any more; what is left is dropped,
            since Python would try, and fail, once more as it exits.
    """
    failure = None
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            failure = failure or error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if failure:
        raise failure
