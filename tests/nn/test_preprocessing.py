import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_flax.nn.preprocessing import prepare_images, resize


@pytest.mark.parametrize("size", [1, 2, 13, 20, 27, 28, 29, 32, 33, 56, 96, 224])
def test_resize_equals_pillow_to_the_pixel(fashion_mnist, size):
    images = fashion_mnist[0].images[:50]
    expected = [
        np.asarray(Image.fromarray(image[..., 0]).resize((size, size), Image.Resampling.BILINEAR))
        for image in images
    ]
    ours = jax.jit(resize, static_argnums=1)(images, size)
    assert ours.dtype == jnp.uint8
    np.testing.assert_array_equal(ours[..., 0], expected)


def test_resize_equals_pillow_on_noise_of_every_level_and_other_shapes():
    images = np.random.default_rng(0).integers(0, 256, (20, 17, 31, 3), np.uint8)
    expected = [
        np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.BILINEAR))
        for image in images
    ]
    np.testing.assert_array_equal(resize(jnp.asarray(images), 40), expected)


def test_prepared_images_are_scaled_as_to_tensor_does():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    prepared = jax.jit(prepare_images, static_argnums=1)(images, 16)
    assert prepared.dtype == jnp.float32
    np.testing.assert_array_equal(prepared, images.astype(np.float32) / np.float32(255))


def test_floats_are_refused():
    with pytest.raises(ValueError, match=r"must be uint8 in 0\.\.255, not float32"):
        prepare_images(jnp.zeros((1, 28, 28, 1)), 96)
