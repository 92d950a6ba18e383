"""TFDS' sets of images by class, read without TensorFlow."""

import contextlib
import difflib
import importlib.util
import io
import logging
import math
import os
import re
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resnet_flax.data.dataset import Dataset, Splits, stratified_split
from resnet_flax.data.image_files import Resizing, empty_images, squared, without_grey_channels
from resnet_flax.data.lazy_images import CHANNELS, LazyImages
from resnet_flax.errors import InputError, reason
from resnet_flax.machine.files import expanded, whole_file

logger = logging.getLogger(__name__)

# NAME, NAME/CONFIGURATION and NAME:VERSION; TFDS' other names would run or fetch foreign code.
TFDS_NAME = re.compile(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?")
NETWORK_TIMEOUT = 10  # seconds without an answer; TFDS would retry for minutes, then wait forever
# Decoded at a time: array_record reads in bulk, and large images should not all be in memory.
EXAMPLES_AT_ONCE = 1000
LABELS = "labels.npy"
OPENING = threading.Lock()  # a cached property alone is computed by each of several threads


def tfds_folder(data_dir: Path | None) -> Path:
    """TFDS' data folder: the one given, or its own default."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return expanded(data_dir or default, "give `data_dir`, or set TFDS_DATA_DIR")


@dataclass(frozen=True)
class RecordStore:
    """Encoded images in the ArrayRecord files that TFDS has prepared.

    Attributes:
        data_path: the prepared folder.
        splits: those whose images these are, one split after the other.
        sizes: how many images each has.
        key: of the image in an example.
    """

    data_path: Path
    splits: list[str]
    sizes: list[int]
    key: str

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, index: int) -> tuple[str, bytes]:
        """As `resnet_flax.data.lazy_images.Store`."""
        number = 0
        while index >= self.sizes[number]:
            index -= self.sizes[number]
            number += 1
        name = f"image {index} of {self.splits[number]} in {self.data_path}"
        try:
            return name, self._sources[number][index][self.key]
        except Exception as error:  # TFDS and array_record raise errors of many kinds
            raise InputError(f"{name} ({reason(error)})") from error

    def read_labels(self, key: str) -> np.ndarray:
        """All labels, int32 (N,), without decoding an image."""
        labels = [example[key] for source in self._sources for example in _in_order(source)]
        return np.array(labels, np.int32)

    @property
    def _sources(self) -> list[Any]:
        with OPENING:
            return self._opened

    @cached_property
    def _opened(self) -> list[Any]:
        with quiet_tfds() as tfds:
            builder = tfds.builder_from_directory(self.data_path)
            decoders = {self.key: tfds.decode.SkipDecoding()}
            return [builder.as_data_source(split, decoders=decoders) for split in self.splits]

    def __getstate__(self) -> dict[str, Any]:  # each process opens the files itself
        return {name: value for name, value in vars(self).items() if name != "_opened"}


def load_tfds(
    name: str,
    folder: Path,
    image_size: int,
    seed: int,
    stream_above: float = math.inf,
    resizing: Resizing | None = None,
    draft: bool = False,
    skip_broken: bool = False,
) -> Splits:
    """As `load_dataset`; prepares the set first, if TFDS can do so here."""
    with quiet_tfds() as tfds:
        builder = _builder(tfds, name, folder)
        if not builder.is_prepared():
            _prepare(builder, name, folder)
        given = builder.info.splits
        test_name = next((each for each in ("test", "validation") if each in given), None)
        splits = ["train", test_name] if test_name else ["train"]
        keys = _keys(tfds, builder, name)
        sizes = [given[split].num_examples for split in splits]
        height, width, _ = builder.info.features[keys[0]].shape
        side = image_size
        if height == width and height and height < side:
            side, resizing = height, None  # small squares stay so, as the training step takes them
        if sum(sizes) * side**2 * CHANNELS > stream_above:
            store = RecordStore(Path(builder.data_path), splits, sizes, keys[0])
            images = LazyImages(
                store, np.arange(len(store)), image_size, resizing, draft, skip_broken
            )
            data = Dataset(images, _labels(builder, store, keys[1]))
        else:
            logger.info(f"{name}: decoding {builder.data_path}")
            data = _read(builder, splits, keys, side, resizing)
        classes = tuple(builder.info.features[keys[1]].names)
    if data.labels.min() < 0:
        raise InputError(f"{name}: there are images without a label in {' or '.join(splits)}")
    if test_name:
        parts = data.hold_out(given[test_name].num_examples)
    else:
        split = stratified_split(data.labels, classes, seed, name)
        parts = (data.select(split[0]), data.select(split[1]))
    return Splits(*parts, classes, resizing=resizing)


def read_examples(builder: Any, split: str) -> Iterator[Any]:
    """Yields a prepared split's decoded examples, in the order in which they are stored."""
    if builder.info.file_format.value == "tfrecord":  # what TFDS prepares with TensorFlow
        deserialize = builder.info.features.deserialize_example_np
        for file in builder.info.splits[split].filepaths:
            yield from map(deserialize, read_tfrecords(Path(file)))
        return
    yield from _in_order(builder.as_data_source(split))


def _in_order(source: Any) -> Iterator[Any]:
    for start in range(0, len(source), EXAMPLES_AT_ONCE):
        yield from source.__getitems__(range(start, min(start + EXAMPLES_AT_ONCE, len(source))))


def read_tfrecords(path: Path) -> Iterator[bytes]:
    """Yields a TFRecord file's records; their checksums are left unread."""
    with path.open("rb") as file:
        while header := file.read(12):  # the record's length in 8 bytes, a checksum in 4
            yield file.read(int.from_bytes(header[:8], "little"))
            file.read(4)


@contextlib.contextmanager
def quiet_tfds() -> Iterator[Any]:
    """Yields TFDS, imported only when needed (it takes a second), with its chatter off."""
    with warnings.catch_warnings(action="ignore"):
        import tensorflow_datasets as tfds  # type: ignore[import-untyped, unused-ignore]
        from absl import logging as absl_logging

        tfds.disable_progress_bar()
        verbosity = absl_logging.get_verbosity()
        absl_logging.set_verbosity(absl_logging.ERROR)
        try:
            yield tfds
        finally:
            absl_logging.set_verbosity(verbosity)


def _builder(tfds: Any, name: str, folder: Path) -> Any:
    try:
        # Some builders need TensorFlow at once, and TFDS then prints a banner.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        message = f"TFDS knows no data set {name}, and none is prepared in {folder}{hint}"
        raise InputError(message) from error
    except Exception as error:  # of many kinds: it runs the builder's code
        raise InputError(f"TFDS cannot open {name}: {reason(error, 300)}") from error


def _prepare(builder: Any, name: str, folder: Path) -> None:
    logger.info(f"{name} is not in {folder}: TFDS downloads and prepares it")
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
            f"{reason(error, 300)}. To supply it, run `tfds build {name} "
            f"--file_format=array_record` where TensorFlow and a network are, and copy the folder "
            f"{builder.name} from ~/tensorflow_datasets into {folder}"
        ) from error


def _keys(tfds: Any, builder: Any, name: str) -> tuple[str, str]:
    features, keys = builder.info.features, builder.info.supervised_keys
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if keys and len(keys) == 2 and all(map(isinstance, (features[key] for key in keys), kinds)):
        return keys
    raise InputError(
        f"{name} is not a set of images by class: TFDS describes its examples as "
        f"{' '.join(str(features).split())[:200]}"
    )


def _labels(builder: Any, store: RecordStore, key: str) -> np.ndarray:
    """All labels, which take ImageNet minutes to read, and are kept beside its files for that."""
    if builder.info.file_format.value != "array_record":
        raise InputError(
            f"{store.data_path} is too large for memory, and its {builder.info.file_format.value} "
            "files cannot be read in any order: prepare it with `--file_format=array_record`"
        )
    kept = store.data_path / LABELS
    with contextlib.suppress(Exception):  # NumPy raises errors of many kinds on damaged files
        labels = np.load(kept)
        if labels.shape == (len(store),) and labels.dtype == np.int32:
            return labels
    logger.info(f"reading the labels in {store.data_path}")
    try:
        labels = store.read_labels(key)
    except Exception as error:  # TFDS and array_record raise errors of many kinds
        raise InputError(f"cannot read {store.data_path} ({reason(error)})") from error
    try:
        with whole_file(kept) as unfinished, unfinished.open("wb") as file:
            np.save(file, labels)
    except InputError as error:
        logger.warning(f"labels not kept: {error}")
    return labels


def _read(
    builder: Any,
    splits: list[str],
    keys: tuple[str, str],
    side: int,
    resizing: Resizing | None,
) -> Dataset:
    image, label = keys
    count = sum(builder.info.splits[split].num_examples for split in splits)
    images, labels = empty_images(count, side), np.empty(count, np.int32)
    try:
        examples = (each for split in splits for each in read_examples(builder, split))
        for index, example in zip(range(count), examples, strict=True):
            pixels = example[image]
            grey = pixels.shape[-1] == 1
            picture = Image.fromarray(pixels[..., 0] if grey else pixels)
            images[index] = squared(picture, side, resizing)
            labels[index] = example[label]
    except Exception as error:  # TFDS and array_record raise errors of many kinds
        raise InputError(
            f"cannot read {builder.data_path} ({reason(error)}): move it away and prepare "
            "it again, or choose another data folder"
        ) from error
    return Dataset(images if resizing else without_grey_channels(images), labels)
