"""TFDS' prepared data sets, read without TensorFlow."""

import contextlib
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Decoded at a time: array_record reads in bulk, and large images should not all be in memory.
EXAMPLES_AT_ONCE = 1000


def tfds_folder(data_dir: Path | None) -> Path:
    """TFDS' data folder: the one given, or its own default."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir or default).expanduser()


def read_examples(builder: Any, split: str) -> Iterator[Any]:
    """Yields a prepared split's decoded examples, in the order in which they are stored.

    Args:
        builder: TFDS' builder of the data set.
        split: its name.
    """
    if builder.info.file_format.value == "tfrecord":  # what TFDS prepares with TensorFlow
        deserialize = builder.info.features.deserialize_example_np
        for file in builder.info.splits[split].filepaths:
            yield from map(deserialize, read_tfrecords(Path(file)))
        return
    source = builder.as_data_source(split)
    for start in range(0, len(source), EXAMPLES_AT_ONCE):
        yield from source.__getitems__(range(start, min(start + EXAMPLES_AT_ONCE, len(source))))


def read_tfrecords(path: Path) -> Iterator[bytes]:
    """Yields a TFRecord file's records; their checksums are left unread."""
    with path.open("rb") as file:
        while header := file.read(12):  # the record's length in 8 bytes, a checksum in 4
            yield file.read(struct.unpack("<Q", header[:8])[0])
            file.read(4)


@contextlib.contextmanager
def quiet_tfds() -> Iterator[Any]:
    """Yields TFDS, imported only when needed (it takes a second), with its chatter off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds  # type: ignore[import-untyped, unused-ignore]
        from absl import logging

        tfds.disable_progress_bar()
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)
        try:
            yield tfds
        finally:
            logging.set_verbosity(verbosity)
