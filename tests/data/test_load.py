"""`load_dataset`: the names it knows, and what it says."""

import numpy as np
import pytest

from resnet_flax.data import FASHION_MNIST_CLASSES, load_dataset
from resnet_flax.errors import InputError


def test_fashion_mnist_stays_what_it_was(fashion_mnist):
    train, test, classes, fit, _ = load_dataset("fashion_mnist", image_size=28)
    assert (classes, fit) == (FASHION_MNIST_CLASSES, "pad")
    for found, wanted in zip((train, test), fashion_mnist, strict=True):
        np.testing.assert_array_equal(found.images, wanted.images)


@pytest.mark.parametrize(
    "name", ["", "../shapes", "/tmp", "a b", "huggingface:mnist", "shapes:*.*.*", "folders:x", "\n"]
)
def test_other_names_are_refused_at_once(name):
    with pytest.raises(InputError) as caught:
        load_dataset(name, image_size=28)
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith("dataset '")
    assert "is neither fashion_mnist, nor a name of TFDS' such as" in line
