from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_flax.nn.preprocessing import augment, prepare_images, resize, resized_crop


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


BOXES = np.array(  # top, left, height, width, as shares
    [(0, 0, 1, 1), (0, 0, 0.5, 0.5), (0.3, 0.55, 0.7, 0.45), (0.123, 0.01, 0.31, 0.9)], np.float32
)


@pytest.mark.parametrize(("height", "width", "channels"), [(17, 17, 3), (12, 20, 1)])
def test_a_resized_crop_has_the_values_of_pillows_box(height, width, channels):
    images = np.random.default_rng(0).normal(size=(len(BOXES), height, width, channels))
    images = images.astype(np.float32)
    expected = np.empty_like(images)
    for image, (top, left, tall, wide), new in zip(images, BOXES, expected, strict=True):
        box = (left * width, top * height, (left + wide) * width, (top + tall) * height)
        for channel in range(channels):
            plane = Image.fromarray(image[..., channel])
            resized = plane.resize((width, height), Image.Resampling.BILINEAR, box)
            new[..., channel] = np.asarray(resized)
    found = jax.jit(resized_crop)(images, BOXES[:, :2], BOXES[:, 2:])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[0], images[0], atol=1e-6)


def boxes(share: float, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Corners and sides of 4,000 random boxes, (N, 2), read off images of their own coordinates."""
    rows, columns = ((np.arange(size) + 0.5) / size for size in shape)
    image = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).astype(np.float32)
    images = jnp.broadcast_to(image, (4000, *image.shape))
    after = np.asarray(augment(jax.random.key(0), images, random_resized_crop=share))
    # A quarter in from each side no border is near.
    first, last = (size // 4 for size in shape), (3 * size // 4 for size in shape)
    low, high = after[:, *first], after[:, *last]
    sides = 2 * (high - low)
    return low - sides * (0.25 + 0.5 / np.array(shape)), sides


@pytest.mark.parametrize(("share", "shape"), [(0.25, (16, 16)), (0.08, (16, 12))])
def test_random_crops_have_uniform_areas_and_ratios_from_3_4_to_4_3_and_lie_inside(share, shape):
    corners, sides = boxes(share, shape)
    assert corners.min() > -1e-4
    assert (corners + sides).max() < 1 + 1e-4
    area, ratio = sides.prod(1), np.log(sides[:, 1] / sides[:, 0])
    expected = np.linspace(share, 1, 11)
    np.testing.assert_allclose(np.quantile(area, np.linspace(0, 1, 11)), expected, atol=0.03)
    free = ratio[area < 0.75]  # which fit at any ratio
    expected = np.log(4 / 3) * np.linspace(-1, 1, 11)
    np.testing.assert_allclose(np.quantile(free, np.linspace(0, 1, 11)), expected, atol=0.03)
    assert np.abs(ratio).max() < np.log(4 / 3) + 1e-3
    inner = (sides < 0.9).all(1)
    where = (corners / (1 - sides))[inner]
    expected = np.linspace(0, 1, 11)
    for axis in (0, 1):
        deciles = np.quantile(where[:, axis], expected)
        np.testing.assert_allclose(deciles, expected, atol=0.05)


def test_a_key_decides_the_crops():
    image = np.random.default_rng(0).normal(size=(8, 8, 1)).astype(np.float32)
    crop = jax.jit(partial(augment, random_resized_crop=0.25))
    first, again, other = (crop(jax.random.key(seed), np.stack([image] * 8)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(np.concatenate([first, other]), axis=0)) == 16


def test_without_crops_the_program_is_as_it_was_and_with_whole_ones_so_are_the_values():
    images = np.random.default_rng(0).normal(size=(20, 8, 8, 1)).astype(np.float32)
    plain = partial(augment, shift=1, flip=True)
    off, whole = (partial(plain, random_resized_crop=share) for share in (0.0, 1.0))
    key = jax.random.key(0)
    assert str(jax.make_jaxpr(off)(key, images)) == str(jax.make_jaxpr(plain)(key, images))
    np.testing.assert_allclose(jax.jit(whole)(key, images), jax.jit(off)(key, images), atol=1e-5)
