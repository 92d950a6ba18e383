"""A folder of images by class, from anywhere: no link leads out of it unless that is asked for."""

import logging
import math
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_flax.data.dataset import Dataset, Splits, shuffle, stratified_split
from resnet_flax.data.image_files import FORMATS, Resizing, listed, printable, read_images
from resnet_flax.data.lazy_images import CHANNELS, FileStore, LazyImages
from resnet_flax.errors import InputError, reason
from resnet_flax.machine.files import expanded, inside

logger = logging.getLogger(__name__)

TRAIN, TEST = "train", ("test", "val", "valid", "validation")  # the first that is there
# What systems put beside a user's folders, in lower case.
SYSTEM = {"__macosx", "__pycache__", "$recycle.bin", "system volume information"}
SYSTEM |= {"@eadir", "#recycle", "lost+found", "thumbs.db", "desktop.ini"}
LONGEST_NAME = 100  # letters of a class


class ImageFiles(NamedTuple):
    """What a folder holds."""

    paths: list[Path]
    labels: np.ndarray  # int32, (N,), each the index of its class
    classes: tuple[str, ...]  # the names of the folders, sorted
    num_train: int | None  # how many of the first are from ``train``; None if it is not split


def load_folder(
    path: str,
    image_size: int,
    seed: int,
    follow_links: bool = False,
    resizing: Resizing | None = None,
    stream_above: float = math.inf,
    draft: bool = False,
    skip_broken: bool = False,
) -> Splits:
    """As `load_dataset`, for a folder as of `find_images`."""
    if not path:
        raise InputError("dataset folder:PATH needs the folder's path")
    folder = expanded(path)
    files = find_images(folder, follow_links)
    if files.num_train is None:
        train, test = stratified_split(files.labels, files.classes, seed, path)
    else:
        parts = np.split(np.arange(len(files.paths)), [files.num_train])
        train, test = (shuffle(part, seed) for part in parts)
    order = np.concatenate([train, test])  # so that each part is a slice, and no copy
    if len(order) * image_size**2 * CHANNELS > stream_above:
        store = FileStore.of(folder, files.paths)
        images: Any = LazyImages(store, order, image_size, resizing, draft, skip_broken)
    else:
        logger.info(f"{path}: reading {len(order)} images")
        paths = [files.paths[index] for index in order]
        images, read = read_images(paths, image_size, resizing, skip_broken)
        test, order = test[np.isin(test, order[read])], order[read]
        if not 0 < len(test) < len(order):
            raise InputError(
                f"{path}: no image to {'train' if len(test) else 'test'} on can be read"
            )
    data = Dataset(images, files.labels[order])
    return Splits(*data.hold_out(len(test)), files.classes, resizing=resizing)


def find_images(folder: Path, follow_links: bool = False) -> ImageFiles:
    """Finds ``folder/CLASS/*.png`` (or .jpg, .jpeg), or the same in ``train`` and ``test``.

    ``val``, ``valid`` or ``validation`` stand in for ``test``. One of these names is a class like
    another if there are images in it. Hidden files (``.name``) and what systems leave behind are
    passed over; the log tells of files that are no images.

    Args:
        folder: where they are.
        follow_links: whether links may lead out of it.

    Raises:
        InputError: when it is no such folder, a class is empty, there are fewer than two, ``train``
            and ``test`` differ in them, or a link leads out of the folder, or to nothing.
    """
    try:
        home = None if follow_links else inside(folder, folder)
        roots = _split(home, folder)
        found = [_find_classes(home, root) for root in roots]
    except OSError as error:
        where = printable(error.filename or folder)
        raise InputError(f"cannot read the images in {where}: {reason(error)}") from error
    classes = tuple(found[0])
    for each, other in ((0, -1), (-1, 0)):
        if lacking := sorted(found[each].keys() - found[other].keys()):
            raise InputError(f"{roots[other]} lacks a folder {lacking[0]}, which {roots[each]} has")
    if len(classes) < 2:
        raise InputError(f"{roots[0]} holds one class only, {classes[0]}: two at least are needed")
    groups = [(label, root[name]) for root in found for label, name in enumerate(classes)]
    labels = np.array([label for label, paths in groups for _ in paths], np.int32)
    num_train = sum(map(len, found[0].values())) if len(roots) > 1 else None
    return ImageFiles([path for _, paths in groups for path in paths], labels, classes, num_train)


def _split(home: Path | None, folder: Path) -> list[Path]:
    """The folders to train and to test on, or the folder itself if there are none."""
    entries = {path.name: path for path in _visible(None, folder) if path.is_dir()}
    named = {name: _checked(home, entries[name]) for name in (TRAIN, *TEST) if name in entries}
    for name, path in [*named.items()]:
        if any(map(_is_image, _visible(home, path))):
            del named[name]  # a class
    tests = [name for name in TEST if name in named]
    if not named:
        return [folder]
    if TRAIN in named and not tests and (flat := [name for name in TEST if name in entries]):
        raise InputError(
            f"{entries[flat[0]]} holds images, but no folders by class: sort them into such, or "
            f"name {folder / TRAIN} to have it split"
        )
    if TRAIN not in named or not tests:
        missing = "test" if TRAIN in named else TRAIN
        present = TRAIN if TRAIN in named else tests[0]
        raise InputError(
            f"{folder} holds {present} but no {missing}: add that folder, or name "
            f"{folder / present} to have it split"
        )
    if others := [name for name in entries if name not in (TRAIN, tests[0])]:
        logger.info(f"{folder}: tested on {tests[0]}; left out: {listed(others)}")
    return [named[TRAIN], named[tests[0]]]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in FORMATS and path.is_file()


def _find_classes(home: Path | None, root: Path) -> dict[str, list[Path]]:
    """Class -> its images, both sorted by name."""
    folders = [path for path in _visible(home, root) if path.is_dir()]
    if not folders:
        raise InputError(f"{root} holds no folders: it needs one for each class, CLASS/*.png")
    classes, others = {}, []
    for folder in folders:
        entries = _visible(home, folder)
        images = [path for path in entries if _is_image(path)]
        others += sorted({*entries} - {*images})
        name = unicodedata.normalize("NFC", folder.name)  # macOS takes accents apart
        if name in classes:
            raise InputError(
                f"{root} holds two folders {name}, spelt differently in Unicode: join them"
            )
        if not (name.isprintable() and len(name) <= LONGEST_NAME):
            raise InputError(f"rename the folder {name!a} in {root}: it is a class's name")
        if not images:
            nested = any(path.is_dir() for path in entries)
            hint = f"; to use the folders in it as classes, name {folder}" if nested else ""
            raise InputError(f"no image in {folder} ({', '.join(FORMATS)}){hint}")
        classes[name] = images
    if others:
        formats = ", ".join(FORMATS)
        logger.warning(f"{root}: left out, being no images ({formats}): {listed(others)}")
    return classes


def _visible(home: Path | None, folder: Path) -> list[Path]:
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(_checked(home, path) for path in paths if path.name.lower() not in SYSTEM)


def _checked(home: Path | None, path: Path) -> Path:
    """The path, if it is no link or leads to something, in the home if there is one."""
    if path.is_symlink():  # following every plain file's path would take long
        try:
            inside(home or Path("/"), path)
        except InputError as error:
            mend = "put a copy in its place, or allow it by `follow_links`"
            raise InputError(f"{printable(path)} is a link out of the folder: {mend}") from error
        except OSError as error:
            link, to, why = printable(path), printable(path.readlink()), printable(reason(error))
            raise InputError(f"{link} is a link to {to} ({why}): mend or remove it") from error
    return path
