"""How good a trained network is, on the test set of its data or of others."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from resnet_flax.data import FASHION_MNIST_CLASSES, FOLDER, Dataset, load_dataset
from resnet_flax.errors import InputError
from resnet_flax.inference.foreign_configs import IMAGENET, UNKNOWN
from resnet_flax.inference.predict import compute_logits
from resnet_flax.inference.pretrained import LARGEST_IMAGE, Network
from resnet_flax.inference.scores import Scores, score
from resnet_flax.machine.devices import STREAMED_SHARE, memory
from resnet_flax.weights import from_torch, guess_model, load_safetensors
from resnet_flax.weights.state_dict import stem_kernel

WORDNET = re.compile(r"n\d{8}")


def evaluate(network: Network, variables: Any, data: Dataset) -> Scores:
    """Scores a network, with its variables, on a test set.

    Raises:
        InputError: when the network takes other images, or tells other classes apart.
    """
    channels, given = network.image_shape[-1], data.images.shape[-1]
    if given != channels:
        raise InputError(
            f"the network takes images of {channels} channels; the test set's have {given}"
        )
    count, given = len(network.classes), data.labels.max() + 1
    if given > count:
        raise InputError(f"the network tells {count} classes apart; the test set has {given}")
    return score(compute_logits(network, variables, data.images), data.labels)


def load_test_set(
    network: Network,
    dataset: str | None = None,
    data_dir: Path | None = None,
    follow_links: bool = False,
) -> Dataset:
    """Loads the test set of the data that a network was trained on, or of others.

    The last three are as of `load_dataset`.

    Raises:
        InputError: when it cannot be loaded, has other classes, or is a folder that only the run
            names: a stranger's run shall not choose what is read.
    """
    if dataset is None and network.dataset.startswith(FOLDER):
        mend = "name the folder by `dataset`"
        raise InputError(f"the network was trained on {network.dataset}: {mend}")
    name = dataset or network.dataset
    if name == UNKNOWN:
        raise InputError("name a data set by `dataset`: the network's own is not known")
    splits = load_dataset(
        name,
        data_dir,
        image_size=network.image_size,
        seed=network.seed,
        follow_links=follow_links,
        resizing=network.resizing,
        stream_above=memory() * STREAMED_SHARE,
    )
    # ImageNet's folders bear WordNet's numbers, in the order of everyone's logits.
    numbered = len(splits.classes) == 1000 and all(map(WORDNET.fullmatch, splits.classes))
    if splits.classes != network.classes and not (numbered and network.dataset == IMAGENET):
        raise InputError(
            f"the network tells {len(network.classes)} classes apart, "
            f"{', '.join(network.classes):.100}; the data set has {len(splits.classes)}, "
            f"{', '.join(splits.classes):.100}"
        )
    test = splits.test
    if network.image_shape[-1] == 3 and test.images.shape[-1] == 1:  # as predict sees grey pictures
        return Dataset(np.repeat(test.images, 3, axis=-1), test.labels)
    return test


def read_weights(
    path: Path, model: str, flavour: str | None = None, image_size: int = 96
) -> tuple[Network, dict[str, Any]]:
    """Reads a network of Fashion-MNIST's classes from a safetensors file of PyTorch's weights.

    Its keys may be in any of `resnet_flax.weights.LAYOUTS`; its flavour is by default ``d2l`` if
    its convolutions have biases. Image sizes are heights and widths in training, in pixels.

    Raises:
        InputError: when the file cannot be read, or is of another network.
    """
    if not 1 <= image_size <= LARGEST_IMAGE:
        raise InputError(f"`image_size` must be between 1 and {LARGEST_IMAGE}, not {image_size}")
    state_dict = load_safetensors(path)
    network = guess_model(model, state_dict, flavour)
    variables = from_torch(network, state_dict)
    leaves = flatten_dict(variables)
    channels, classes = leaves[stem_kernel(leaves)].shape[2], FASHION_MNIST_CLASSES
    if (count := network.num_classes) != len(classes):
        raise InputError(f"{path} tells {count} classes apart; Fashion-MNIST has {len(classes)}")
    return Network(network, classes, (28, 28, channels), image_size), variables
