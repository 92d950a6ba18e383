"""Files to arrays: Fashion-MNIST, TFDS' sets of images by class, folders of images, photos."""

from resnet_flax.data.dataset import Dataset, Splits, shuffled_batches
from resnet_flax.data.fashion_mnist import FASHION_MNIST_CLASSES, load_fashion_mnist
from resnet_flax.data.image_files import (
    FITS,
    INTERPOLATIONS,
    Photo,
    Resizing,
    bright_border,
    printable,
    read_photos,
)
from resnet_flax.data.lazy_images import LazyImages
from resnet_flax.data.load import FOLDER, load_dataset
from resnet_flax.data.stream import BatchStream, default_workers

__all__ = [
    "FASHION_MNIST_CLASSES",
    "FITS",
    "FOLDER",
    "INTERPOLATIONS",
    "BatchStream",
    "Dataset",
    "LazyImages",
    "Photo",
    "Resizing",
    "Splits",
    "bright_border",
    "default_workers",
    "load_dataset",
    "load_fashion_mnist",
    "printable",
    "read_photos",
    "shuffled_batches",
]
