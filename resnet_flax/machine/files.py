"""Files that are written whole or not at all, and links that do not lead out of a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from resnet_flax.errors import InputError, reason


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path beside the file, to be written to; at the end it takes the file's name.

    Raises:
        InputError: when it cannot be written; an older file is as it was, nothing else is left.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.unlink(missing_ok=True)  # such a link may have come with a stranger's folder
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            unfinished.unlink(missing_ok=True)


def inside(home: Path, path: Path) -> Path:
    """Returns a path in a folder with all links followed.

    Raises:
        InputError: when it is a link that leads out of the folder.
        OSError: when it leads nowhere.
    """
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # links in a circle
        raise OSError(f"links in a circle: {path}") from error
    if not real.is_relative_to(home.resolve()):
        raise InputError(f"{path} is a link out of the folder: put a copy in its place")
    return real
