"""Files and folders written whole or not at all, and links that do not lead out of a folder."""

import contextlib
import os
import secrets
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
    # Nobody's else: threads share a process's number, and containers give each other's again.
    unfinished = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        if path.exists() and not path.is_file():  # root could replace a device
            raise OSError("Is a directory" if path.is_dir() else "it is no plain file")
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
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    old = path.with_name(f"{unfinished.name}.old")
    try:
        held = path.iterdir() if path.is_dir() else ()
        if others := [each.name for each in held if each.name not in names or each.is_dir()]:
            shown = f"{min(others)!a:.100}"
            raise InputError(
                f"cannot write {path}: it holds other things ({shown}): name a new folder"
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
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:  # it names the path in full from Python 3.13 on, as written before
        raise OSError(error.errno, error.strerror, str(path)) from error
    if not real.is_relative_to(home.resolve()):
        raise InputError(f"{path} is a link out of the folder: put a copy in its place")
    return real


def expanded(path: str | os.PathLike[str], mend: str = "name the folder in full") -> Path:
    """Returns a path with the home folder in the place of ``~``.

    Raises:
        InputError: when that is not known; it tells how to mend it.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"there is no home folder for {path}: {mend}") from error
