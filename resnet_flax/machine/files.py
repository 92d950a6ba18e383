"""Files and folders written whole or not at all, and links that do not lead out of a folder."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
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


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], names: Collection[str]) -> Iterator[Path]:
    """Yields an empty folder beside the path, to be filled; at the end it takes the path's name.

    An older folder is replaced if it holds nothing but files of these names.

    Raises:
        InputError: when it cannot be written; an older one is as it was, nothing else is left.
    """
    path = Path(path)
    if not path.name or (os.path.lexists(path) and not path.is_dir()):
        raise InputError(f"cannot write {path}: it is no new folder: name one")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    old = path.with_name(f"{unfinished.name}.old")
    try:
        if path.is_dir() and (others := {each.name for each in path.iterdir()} - {*names}):
            raise InputError(
                f"cannot write {path}: it holds other things ({min(others)!a:.100}): name a new "
                "folder"
            )
        unfinished.mkdir()
        yield unfinished
        if os.path.lexists(path):
            path.rename(old)
        unfinished.rename(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if os.path.lexists(old):
            _settle(path, old)


def _settle(path: Path, old: Path) -> None:
    """Removes what a folder has replaced, or puts it back if it was not replaced."""
    if not os.path.lexists(path):
        old.rename(path)
    elif old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


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
