"""A data set by its name."""

import logging
import math
from pathlib import Path

from resnet_flax.data.dataset import Splits
from resnet_flax.data.fashion_mnist import FASHION_MNIST_CLASSES, load_fashion_mnist
from resnet_flax.data.folder import load_folder
from resnet_flax.data.image_files import Resizing
from resnet_flax.data.lazy_images import LazyImages
from resnet_flax.data.tfds import TFDS_NAME, load_tfds, tfds_folder
from resnet_flax.errors import InputError

logger = logging.getLogger(__name__)

FASHION_MNIST = "fashion_mnist"
FOLDER = "folder:"


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: int,
    seed: int = 0,
    follow_links: bool = False,
    resizing: Resizing | None = None,
    stream_above: float = math.inf,
    draft: bool = False,
    skip_broken: bool = False,
) -> Splits:
    """Loads a data set by its name; the log tells of each choice made.

    Args:
        name: ``fashion_mnist``; ``folder:PATH``, as of `resnet_flax.data.folder.find_images`; or
            any of TFDS' sets of images by class, such as ``cifar10``.
        data_dir: TFDS' data folder, by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        image_size: the size in pixels that the images will be resized to.
        seed: decides which images are for testing, where the data do not say, and a folder's order.
        follow_links: whether links in a folder may lead out of it.
        resizing: how images from the disk are made square.
        stream_above: bytes of decoded images beyond which they stay on the disk (`LazyImages`).
        draft: as of `LazyImages`.
        skip_broken: leave out a folder's images that cannot be read, or, of any set that stays on
            the disk, pass over them when it turns out.

    Raises:
        InputError: when the data set is unknown, not there, damaged, or not one of images by class.
    """
    if name == FASHION_MNIST:
        return Splits(*load_fashion_mnist(data_dir), FASHION_MNIST_CLASSES, fit="pad")
    if name.startswith(FOLDER):
        path = name.removeprefix(FOLDER)
        splits = load_folder(
            path, image_size, seed, follow_links, resizing, stream_above, draft, skip_broken
        )
    elif TFDS_NAME.fullmatch(name):
        splits = load_tfds(
            name,
            tfds_folder(data_dir),
            image_size,
            seed,
            stream_above,
            resizing,
            draft,
            skip_broken,
        )
    else:
        raise InputError(
            f"dataset {name!r} is neither {FASHION_MNIST}, nor a name of TFDS' such as cifar10, "
            f"nor {FOLDER}PATH"
        )
    lazily = "; decoded as they are needed" if isinstance(splits.train.images, LazyImages) else ""
    _, height, width, channels = splits.train.images.shape
    logger.info(
        f"{name}: {len(splits.train)} images to train on, {len(splits.test)} to test on; "
        f"{height}x{width} pixels, {'grey' if channels == 1 else 'coloured'}; "
        f"{len(splits.classes)} classes{lazily}"
    )
    return splits
