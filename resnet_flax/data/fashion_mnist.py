"""Fashion-MNIST through TensorFlow Datasets (TFDS), without TensorFlow, as plain NumPy arrays.

TFDS prepares `fashion_mnist` with TensorFlow; a subclass of its builder prepares the same folder
without. Whatever the source, what is returned has passed one check: the SHA-256 of its content.
"""

import contextlib
import gzip
import hashlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resnet_flax.data.dataset import Dataset
from resnet_flax.data.fashion_mnist_files import gather_raw_files, sha256
from resnet_flax.data.tfds import quiet_tfds, read_examples, tfds_folder
from resnet_flax.errors import InputError, reason
from resnet_flax.machine.files import whole_file

logger = logging.getLogger(__name__)

# fmt: off
FASHION_MNIST_CLASSES: tuple[str, ...] = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)
# fmt: on
"""D2L's names of the labels 0 to 9, in TFDS' order."""

_NAME, _VERSION = "fashion_mnist", "3.0.1"
_SIZES = {"train": 60_000, "test": 10_000}
_SIDE = 28  # pixels
# Of the original files' bytes after their headers, in the order of the decoded copy below.
_CONTENT_SHA256 = "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"


def load_fashion_mnist(data_dir: Path | None = None) -> tuple[Dataset, Dataset]:
    """Loads Fashion-MNIST; prepares it first, as TFDS would, if its data folder does not hold it.

    The raw files come from the first of: `<data_dir>/downloads/manual` (TFDS' folder for files
    fetched by hand), Debian's package dataset-fashion-mnist if it is installed, TFDS' registered
    URLs, Debian's archive through apt-get (no root needed). The decoded arrays are kept beside the
    prepared folder, so that later starts take a moment.

    Returns 60,000 examples to train on and 10,000 to test on, in the order of the original files.

    Raises:
        InputError: if no source has the data, the folder cannot be written, a file supplied by
            hand is not Fashion-MNIST's, or the prepared folder is damaged or holds other data.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017 (arXiv:1708.07747).
    """
    folder = tfds_folder(data_dir)
    try:
        # A file, because TFDS takes any *folder* here for a version or a configuration.
        decoded = folder / _NAME / f"decoded-{_VERSION}.bin"
        content = _read_decoded(decoded)
        if content is None:
            if not (folder / _NAME / _VERSION).exists():
                _prepare(folder)
            content = _read_prepared(folder)
            try:
                with whole_file(decoded) as unfinished:
                    content.tofile(unfinished)
            except InputError as error:  # a shared, read-only folder still loads, only more slowly
                logger.warning(f"Fashion-MNIST: decoded copy not kept: {error}")
    except OSError as error:  # no permission, no space, a file in the place of a folder
        raise InputError(f"cannot keep Fashion-MNIST in {folder}: {reason(error)}") from error
    train, test = np.split(content, [_SIZES["train"] * (_SIDE * _SIDE + 1)])
    return _as_dataset(train), _as_dataset(test)


def _as_dataset(content: np.ndarray) -> Dataset:
    """Of a split's part of the decoded copy: images, then labels, all bytes."""
    count = len(content) // (_SIDE * _SIDE + 1)
    images, labels = np.split(content, [-count])
    return Dataset(images.reshape(-1, _SIDE, _SIDE, 1), labels.astype(np.int32))


def _read_decoded(path: Path) -> np.ndarray | None:
    if not path.exists():
        return None
    content = np.fromfile(path, dtype=np.uint8)
    if sha256(content.data) == _CONTENT_SHA256:
        return content
    logger.warning(f"Fashion-MNIST: {path} is damaged, rebuilding it")
    return None


def _read_prepared(folder: Path) -> np.ndarray:
    prepared = folder / _NAME / _VERSION
    logger.info(f"Fashion-MNIST: decoding {prepared}")
    mend = "move it away and start again, or choose another data folder"
    with quiet_tfds() as tfds:
        try:
            builder = tfds.builder(f"{_NAME}:{_VERSION}", data_dir=folder)
            parts = [part for split in _SIZES for part in _decode_split(builder, split)]
        except Exception as error:  # TFDS and array_record raise errors of many kinds
            raise InputError(f"cannot read {prepared} ({reason(error)}): {mend}") from error
    content = np.concatenate(parts)
    if sha256(content.data) != _CONTENT_SHA256:
        raise InputError(f"{prepared} does not hold Fashion-MNIST (its SHA-256 differs): {mend}")
    return content


def _decode_split(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a split's image and label bytes in the original files' order."""
    examples = list(read_examples(builder, split))
    # TFDS stores the examples by the MD5 of the split's name and the example's number.
    keys = [hashlib.md5(f"{split}{i}".encode()).digest() for i in range(len(examples))]
    original = np.argsort(sorted(range(len(keys)), key=keys.__getitem__))
    images = np.stack([example["image"] for example in examples])
    labels = np.array([example["label"] for example in examples], dtype=np.uint8)
    return images[original].reshape(-1), labels[original]


def _prepare(folder: Path) -> None:
    """Makes TFDS' folder: complete or not at all, whatever fails and whoever else makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    prepared = folder / _NAME / _VERSION
    scratch = tempfile.TemporaryDirectory(
        prefix="incomplete.", dir=folder, ignore_cleanup_errors=True
    )
    with scratch as temporary, quiet_tfds() as tfds:
        staging = Path(temporary).absolute()  # on the same disk
        registered = tfds.image_classification.FashionMNIST.url_infos
        raw = gather_raw_files(registered, manual=folder / "downloads" / "manual", scratch=staging)
        logger.info(f"Fashion-MNIST: preparing {prepared}")
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints its progress
            _fashion_mnist_builder(tfds)(data_dir=staging).download_and_prepare(
                download_dir=staging / "downloads",
                download_config=tfds.download.DownloadConfig(
                    manual_dir=raw, try_download_gcs=False, force_checksums_validation=True
                ),
                file_format="array_record",
            )
        prepared.parent.mkdir(exist_ok=True)
        try:
            (staging / _NAME / _VERSION).rename(prepared)
        except OSError:  # another process was first; its folder has passed the same checks
            if not prepared.exists():
                raise


def _fashion_mnist_builder(tfds: Any) -> Any:
    """Returns TFDS' own builder with its two uses of TensorFlow replaced."""
    base: Any = tfds.image_classification.FashionMNIST

    class FashionMNIST(base, skip_registration=True):  # type: ignore[misc, call-arg]
        name = _NAME

        def _split_generators(self, dl_manager: Any) -> Any:
            files = dl_manager.download({Path(url).name: url for url in base.url_infos})
            contents = {name: gzip.decompress(file.read_bytes()) for name, file in files.items()}
            return {
                split: self._generate_examples(
                    images=contents[f"{prefix}-images-idx3-ubyte.gz"][16:],
                    labels=contents[f"{prefix}-labels-idx1-ubyte.gz"][8:],
                )
                for split, prefix in (("train", "train"), ("test", "t10k"))
            }

        def _generate_examples(self, images: bytes, labels: bytes) -> Iterator[tuple[int, Any]]:
            pixels = np.frombuffer(images, dtype=np.uint8).reshape(-1, _SIDE, _SIDE)
            for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
                png = io.BytesIO()  # an array would be encoded by TensorFlow
                Image.fromarray(image).save(png, format="PNG")
                yield index, {"image": png.getvalue(), "label": label}

    return FashionMNIST
