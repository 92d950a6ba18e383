"""The data sets that ``--dataset`` names: Fashion-MNIST, others of TFDS, folders of images."""

import contextlib
import difflib
import importlib.util
import io
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from resnet_flax.data.fashion_mnist import (
    FASHION_MNIST_CLASSES,
    Dataset,
    load_fashion_mnist,
    shuffled_batches,
)
from resnet_flax.data.folder import (
    as_square,
    empty_images,
    find_images,
    read_images,
    without_grey_channels,
)
from resnet_flax.data.tfds import quiet_tfds, read_examples, tfds_folder
from resnet_flax.errors import InputError, one_line

FASHION_MNIST = "fashion_mnist"
FOLDER = "folder:"
TEST_SHARE = 0.2  # of each class, where the data have no test set of their own
# NAME, NAME/CONFIGURATION and NAME:VERSION; TFDS' other names would run or fetch foreign code.
TFDS_NAME = re.compile(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?")
NETWORK_TIMEOUT = 10  # seconds without an answer; TFDS would retry for minutes

Report = Callable[[str], None]


class Splits(NamedTuple):
    """A data set to train and to test on.

    Attributes:
        train: in an order that mixes the classes.
        test: likewise.
        classes: their names, in the order of the labels.
    """

    train: Dataset
    test: Dataset
    classes: tuple[str, ...]

    @classmethod
    def select(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        classes: tuple[str, ...],
        train: Any,
        test: Any,
    ) -> Self:
        """Picks the two parts, by slices or indices, from all examples."""
        return cls(
            Dataset(images[train], labels[train]), Dataset(images[test], labels[test]), classes
        )


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: int,
    seed: int = 0,
    report: Report = lambda line: None,
) -> Splits:
    """Loads a data set by its name.

    Args:
        name: ``fashion_mnist``; or ``folder:PATH``, see `resnet_flax.data.folder.find_images`; or
            any of TFDS' sets of images by class, such as ``cifar10``.
        data_dir: TFDS' data folder, as in `load_fashion_mnist`.
        image_size: the size in pixels that the images will be resized to. Those that differ in
            size, are no squares, or are larger become squares of this size right away, see
            `resnet_flax.data.folder.read_images`.
        seed: decides which images are for testing, where the data do not say, and a folder's order.
        report: receives a line before what takes time, and for each choice made.

    Raises:
        InputError: when the data set is unknown, not there, damaged, or not one of images by class.
    """
    if name == FASHION_MNIST:
        return Splits(*load_fashion_mnist(data_dir, report=report), FASHION_MNIST_CLASSES)
    if name.startswith(FOLDER):
        splits = _load_folder(name.removeprefix(FOLDER), image_size, seed, report)
    elif TFDS_NAME.fullmatch(name):
        splits = _load_tfds(name, tfds_folder(data_dir), image_size, seed, report)
    else:
        raise InputError(
            f"--dataset {name!r} is neither {FASHION_MNIST}, nor a name of TFDS' such as cifar10, "
            f"nor {FOLDER}PATH"
        )
    _, height, width, channels = splits.train.images.shape
    report(
        f"{name}: {len(splits.train)} images to train on, {len(splits.test)} to test on; "
        f"{height}x{width} pixels, {'grey' if channels == 1 else 'coloured'}; "
        f"{len(splits.classes)} classes"
    )
    return splits


def stratified_split(
    labels: np.ndarray, classes: tuple[str, ...], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples 80 to 20 within each class.

    Args:
        labels: integers, (N,).
        classes: their names.
        seed: decides the split and the orders.

    Returns:
        The indices to train on and those to test on, both in a random order.

    Raises:
        InputError: when a class has one example only.
    """
    order = shuffle(np.arange(len(labels)), seed)
    tested = np.zeros(len(labels), bool)
    for label, name in enumerate(classes):
        members = order[labels[order] == label]
        if len(members) < 2:
            raise InputError(
                f"the class {name} has {len(members)} image, too few to train and to test on"
            )
        tested[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    return order[~tested[order]], order[tested[order]]


def shuffle(indices: np.ndarray, seed: int) -> np.ndarray:
    """The indices in another order, the same on every machine."""
    (order,) = shuffled_batches(len(indices), len(indices), seed=seed, epoch=0)
    return indices[order]


def _split(
    what: str, labels: np.ndarray, classes: tuple[str, ...], seed: int, report: Report
) -> tuple[np.ndarray, np.ndarray]:
    report(
        f"{what} has no test set of its own: {TEST_SHARE:.0%} of each class, drawn with seed "
        f"{seed}, are kept out of training for it"
    )
    return stratified_split(labels, classes, seed)


def _load_folder(path: str, image_size: int, seed: int, report: Report) -> Splits:
    if not path:
        raise InputError(f"--dataset {FOLDER}PATH needs the folder's path")
    files = find_images(Path(path).expanduser(), report)
    if files.num_train is None:
        train, test = _split(path, files.labels, files.classes, seed, report)
    else:
        parts = np.split(np.arange(len(files.paths)), [files.num_train])
        train, test = (shuffle(part, seed) for part in parts)
    order = np.concatenate([train, test])  # so that each part is a slice, and no copy
    report(f"{path}: reading {len(order)} images")
    images = read_images([files.paths[index] for index in order], image_size)
    end = len(train)
    return Splits.select(
        images, files.labels[order], files.classes, slice(None, end), slice(end, None)
    )


def _load_tfds(name: str, folder: Path, image_size: int, seed: int, report: Report) -> Splits:
    with quiet_tfds() as tfds:
        builder = _builder(tfds, name, folder)
        if not builder.is_prepared():
            _prepare(builder, name, folder, report)
        given = builder.info.splits
        test_name = next((each for each in ("test", "validation") if each in given), None)
        splits = ["train", test_name] if test_name else ["train"]
        keys = _keys(tfds, builder, name)
        report(f"{name}: decoding {builder.data_path}")
        images, labels = _read(builder, splits, keys, image_size)
        classes = tuple(builder.info.features[keys[1]].names)
    if labels.min() < 0:
        raise InputError(f"{name}: there are images without a label in {' or '.join(splits)}")
    if test_name:
        end = given["train"].num_examples
        return Splits.select(images, labels, classes, slice(None, end), slice(end, None))
    return Splits.select(images, labels, classes, *_split(name, labels, classes, seed, report))


def _builder(tfds: Any, name: str, folder: Path) -> Any:
    """TFDS' builder of a data set, prepared or not."""
    try:
        # Some builders need TensorFlow at once, and TFDS then prints a banner.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"TFDS knows no data set {name}, and none is prepared in {folder}{hint}"
        ) from error
    except Exception as error:  # of many kinds: it runs the builder's code
        raise InputError(f"TFDS cannot open {name}: {one_line(error)[:300]}") from error


def _prepare(builder: Any, name: str, folder: Path, report: Report) -> None:
    """Lets TFDS download and prepare a data set, for which it needs TensorFlow and a network."""
    report(f"{name} is not in {folder}: TFDS downloads and prepares it")
    try:
        if importlib.util.find_spec("tensorflow") is None:
            raise ModuleNotFoundError("TensorFlow is not installed")
        urls = [url for url in sorted(builder.url_infos or ()) if url.startswith("http")]
        for url in urls[:1]:
            with contextlib.suppress(urllib.error.HTTPError):  # an answer, at least
                urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT).close()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints its progress
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # of many kinds: it runs the builder's code
        raise InputError(
            f"{name} is not in {folder}, and TFDS cannot prepare it here: "
            f"{one_line(error)[:300]}. To supply it, run `tfds build {name} "
            f"--file_format=array_record` where TensorFlow and a network are, and copy the folder "
            f"{builder.name} from ~/tensorflow_datasets into {folder}"
        ) from error


def _keys(tfds: Any, builder: Any, name: str) -> tuple[str, str]:
    """The names of the image and of its label."""
    features, keys = builder.info.features, builder.info.supervised_keys
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if keys and len(keys) == 2 and all(map(isinstance, (features[key] for key in keys), kinds)):
        return keys
    raise InputError(
        f"{name} is not a set of images by class: TFDS describes its examples as "
        f"{' '.join(str(features).split())[:200]}"
    )


def _read(
    builder: Any, splits: list[str], keys: tuple[str, str], image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of the splits, one after the other."""
    image, label = keys
    height, width, _ = builder.info.features[image].shape
    side = height if height == width and (height or image_size) < image_size else image_size
    count = sum(builder.info.splits[split].num_examples for split in splits)
    images, labels = empty_images(count, side), np.empty(count, np.int32)
    try:
        examples = chain.from_iterable(read_examples(builder, split) for split in splits)
        for index, example in zip(range(count), examples, strict=True):
            pixels = example[image]
            grey = pixels.shape[-1] == 1
            images[index] = as_square(Image.fromarray(pixels[..., 0] if grey else pixels), side)
            labels[index] = example[label]
    except Exception as error:  # TFDS and array_record raise errors of many kinds
        raise InputError(
            f"cannot read {builder.data_path} ({one_line(error)[:200]}): move it away and prepare "
            "it again, or choose another data folder"
        ) from error
    return without_grey_channels(images), labels
