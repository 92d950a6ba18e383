"""A folder of images by class, from anywhere: no link in it is followed out of it."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_flax.data.dataset import Dataset, Splits, shuffle, stratified_split
from resnet_flax.data.image_files import FORMATS, listed, read_images
from resnet_flax.errors import InputError, reason
from resnet_flax.machine.files import expanded, inside

logger = logging.getLogger(__name__)

SPLITS = ("train", "test")
LONGEST_NAME = 100  # letters of a class


class ImageFiles(NamedTuple):
    """What a folder holds."""

    paths: list[Path]
    labels: np.ndarray  # int32, (N,), each the index of its class
    classes: tuple[str, ...]  # the names of the folders, sorted
    num_train: int | None  # how many of the first are from ``train``; None without that folder


def load_folder(path: str, image_size: int, seed: int) -> Splits:
    """As `load_dataset`, for a folder as of `find_images`."""
    if not path:
        raise InputError("dataset folder:PATH needs the folder's path")
    files = find_images(expanded(path))
    if files.num_train is None:
        train, test = stratified_split(files.labels, files.classes, seed, path)
    else:
        parts = np.split(np.arange(len(files.paths)), [files.num_train])
        train, test = (shuffle(part, seed) for part in parts)
    order = np.concatenate([train, test])  # so that each part is a slice, and no copy
    logger.info(f"{path}: reading {len(order)} images")
    images = read_images([files.paths[index] for index in order], image_size)
    return Splits(*Dataset(images, files.labels[order]).hold_out(len(test)), files.classes)


def find_images(folder: Path) -> ImageFiles:
    """Finds ``folder/CLASS/*.png`` (or .jpg, .jpeg), or the same in ``train`` and ``test``.

    What is hidden in it (``.name``) is passed over; the log tells of files that are no images.

    Raises:
        InputError: when it is no such folder, a class is empty, there are fewer than two, ``train``
            and ``test`` differ in them, or a link leads out of the folder.
    """
    try:
        home = inside(folder, folder)
        present = [name for name in SPLITS if (folder / name).is_dir()]
        if len(present) == 1:
            (missing,) = {*SPLITS} - {*present}
            raise InputError(
                f"{folder} holds {present[0]} but no {missing}: add that folder, or name "
                f"{folder / present[0]} to have it split"
            )
        roots = [_checked(home, folder / name) for name in present] or [folder]
        found = [_find_classes(home, root) for root in roots]
    except OSError as error:
        raise InputError(f"cannot read the images in {folder}: {reason(error)}") from error
    classes = tuple(found[0])
    for each, other in ((0, -1), (-1, 0)):
        if lacking := sorted(found[each].keys() - found[other].keys()):
            raise InputError(f"{roots[other]} lacks a folder {lacking[0]}, which {roots[each]} has")
    if len(classes) < 2:
        raise InputError(f"{roots[0]} holds one class only, {classes[0]}: two at least are needed")
    groups = [(label, root[name]) for root in found for label, name in enumerate(classes)]
    labels = np.array([label for label, paths in groups for _ in paths], np.int32)
    num_train = sum(map(len, found[0].values())) if present else None
    return ImageFiles([path for _, paths in groups for path in paths], labels, classes, num_train)


def _find_classes(home: Path, root: Path) -> dict[str, list[Path]]:
    """Class -> its images, both sorted by name."""
    folders = [path for path in _visible(home, root) if path.is_dir()]
    if not folders:
        raise InputError(f"{root} holds no folders: it needs one for each class, CLASS/*.png")
    classes, others = {}, []
    for folder in folders:
        entries = _visible(home, folder)
        images = [path for path in entries if path.suffix.lower() in FORMATS and path.is_file()]
        others += sorted({*entries} - {*images})
        name = folder.name
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


def _visible(home: Path, folder: Path) -> list[Path]:
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(_checked(home, path) for path in paths)


def _checked(home: Path, path: Path) -> Path:
    if path.is_symlink():  # following every plain file's path would take long
        inside(home, path)
    return path
