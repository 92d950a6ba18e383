"""The commonest slips of callers, each with a message that says what to do."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_flax import ResNet
from resnet_flax.nn import resnet
from resnet_flax.nn.preprocessing import resize
from resnet_flax.training.step import Images, create_train_state

MODEL = ResNet((1,), stem="cifar", channels=4, num_classes=10)
IMAGES = np.zeros((2, 8, 8, 1), np.float32)


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype), shapes)


def trace(variables, images, **arguments):
    """Calls the network without computing anything."""
    return jax.eval_shape(lambda v, x: MODEL.apply(v, x, **arguments), variables, images)


def test_what_is_right_passes_without_a_word(variables):
    trace(variables, IMAGES)
    trace(variables, IMAGES, train=True, mutable=["batch_stats"])
    trace(variables, IMAGES.astype(jnp.bfloat16))
    trace(variables, IMAGES[:0])
    trace(variables, np.zeros((2, 1, 9, 1), np.float32))
    resnet.check_network_input(np.full((2, 8, 8, 1), -5.0, np.float32))  # normalised
    resnet.check_network_input(np.full((2, 8, 8, 1), np.nan, np.float32))
    resnet.check_network_input(np.zeros((2, 1, 100, 12), np.float32))  # a signal of 12 channels


def test_a_forgotten_mutable_says_what_to_pass(variables):
    with pytest.raises(ValueError, match=r'train=True, mutable=\["batch_stats"\]\)'):
        trace(variables, IMAGES, train=True)
    with pytest.raises(ValueError, match="pass mutable to apply"):
        trace(variables, IMAGES, train=True, mutable=["intermediates"])


@pytest.mark.parametrize("channels", [1, 3])
def test_pytorchs_order_of_axes_is_recognised(variables, channels):
    images = np.zeros((2, channels, 8, 8), np.float32)
    with pytest.raises(ValueError, match=r"looks like PyTorch's \(N, C, H, W\): transpose by"):
        trace(variables, images)
    with pytest.raises(ValueError, match="looks like PyTorch's"):
        jax.eval_shape(MODEL.init, jax.random.key(0), images)


def test_other_numbers_of_channels_are_told_with_the_shape_wanted(variables):
    for shape in ((2, 8, 8, 3), (2, 4, 8, 9)):
        words = (
            f"conv1: the input must have shape (N, H, W, 1), not {shape}; the parameters were made "
            "for 1 channels"
        )
        with pytest.raises(ValueError, match=re.escape(words)):
            trace(variables, np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_integers_are_refused(variables, dtype):
    with pytest.raises(ValueError, match=r"floating point in \[0, 1\], not .*: divide them by 255"):
        trace(variables, IMAGES.astype(dtype))


@pytest.mark.parametrize("array", [np.full, jnp.full])
def test_values_up_to_255_are_told_where_they_are_at_hand(array, variables):
    images = array((2, 8, 8, 1), 200.0, np.float32)
    with pytest.warns(UserWarning, match=r"should be in \[0, 1\], but a pixel is 200: divide"):
        resnet.check_network_input(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(variables, images)  # there are no values yet
    with pytest.warns(UserWarning, match="divide them by 255"):
        MODEL.apply(variables, images)


def test_images_to_resize(variables):
    with pytest.raises(ValueError, match=r"\(N, H, W, C\), not \(8, 8\)"):
        resize(np.zeros((8, 8), np.uint8), 4)
    with pytest.raises(ValueError, match=r"uint8 in 0\.\.255, not float32"):
        resize(IMAGES, 4)


PIXELS = np.zeros((6, 8, 8, 1), np.uint8)
LABELS = np.arange(6, dtype=np.int32)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (
            PIXELS,
            np.eye(6),
            "labels must be integers of shape (N,), not of shape (6, 6): of one-ho",
        ),
        (PIXELS, LABELS.astype(np.float32), "labels must be integers of shape (6,), one for each"),
        (
            PIXELS,
            LABELS[:5],
            "labels must be integers of shape (6,), one for each image, not int32",
        ),
        (PIXELS / np.float32(255), LABELS, "images must be uint8 in 0..255, not float32"),
        (PIXELS[..., 0], LABELS, "images must have shape (N, H, W, C), not (6, 8, 8)"),
        (PIXELS.transpose(0, 3, 1, 2), LABELS, "looks like PyTorch's (N, C, H, W)"),
    ],
)
def test_data_sets_of_another_form(images, labels, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Images.place(images, labels)


@pytest.mark.parametrize(("label", "found"), [(10, "0..10"), (-1, "-1..5")])
def test_labels_out_of_range(label, found):
    labels = LABELS.copy()
    labels[0] = 0
    labels[2] = label
    data = Images.place(PIXELS, labels)
    words = f"labels must be in 0..9 for 10 classes, not in {found}"
    with pytest.raises(ValueError, match=re.escape(words)):
        create_train_state(MODEL, optax.sgd(0.1), data, seed=0)
