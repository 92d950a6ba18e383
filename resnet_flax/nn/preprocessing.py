"""Images as D2L feeds them to the network: resized like Pillow, scaled to [0, 1], on the device.

D2L resizes with torchvision's ``Resize`` on a PIL image and then applies ``ToTensor``. Pillow works
on uint8 in fixed point and rounds after each of its two passes, so a floating-point resize differs
from it by up to one grey level; this one does not differ at all.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt8

# Pillow's fixed point for 8-bit images: 32 bits less 8 for the pixel and 2 for the sum.
PRECISION_BITS = 22


class Normalization(NamedTuple):
    """What a network subtracts from each channel of pixels in [0, 1], and divides it by then."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Any) -> Any:
        """Normalises images in [0, 1], (..., C), of NumPy or JAX, as torchvision does."""
        return (images - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def as_text(self) -> tuple[str, str]:
        """Mean and standard deviation, to be read."""
        mean, std = (", ".join(f"{n:g}" for n in values) for values in self)
        return mean, std


# Of ImageNet's pixels, as torchvision, timm and transformers have them.
IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def prepare_images(
    images: UInt8[Array, "N H W C"], image_size: int, normalization: Normalization | None = None
) -> Float32[Array, "N {image_size} {image_size} C"]:
    """Resizes and scales a batch, and normalises it if asked to.

    Args:
        images: uint8, (N, H, W, C).
        image_size: height and width wanted, in pixels.
        normalization: of the C channels.

    Returns:
        float32, in [0, 1] before it is normalised, (N, image_size, image_size, C).
    """
    # XLA would turn a division by 255 into a product that is off by a bit; the table is exact.
    scaled = np.arange(256, dtype=np.float32) / np.float32(255)
    pixels = resize(images, image_size)
    if normalization is None:
        return jnp.asarray(scaled)[pixels]
    table = jnp.asarray(normalization(scaled[:, None]))  # (256, C)
    return table[pixels, jnp.arange(pixels.shape[-1])]


def resize(
    images: UInt8[Array, "N H W C"], image_size: int
) -> UInt8[Array, "N {image_size} {image_size} C"]:
    """Resizes uint8 images to the pixel as ``PIL.Image.resize(..., Image.BILINEAR)``.

    Bilinear with half-pixel centres; when it shrinks, the filter widens (antialiasing).

    Args:
        images: uint8, (N, H, W, C).
        image_size: height and width wanted, in pixels.

    Returns:
        uint8, (N, image_size, image_size, C).

    Raises:
        ValueError: when the images are not uint8, or of another shape.
    """
    check_shape(images)
    if images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8 in 0..255, not {images.dtype}")
    for axis in (2, 1):  # Pillow's order: rows become wider first, then the image taller.
        if images.shape[axis] != image_size:
            images = _resize_axis(images, axis, image_size)
    return images


def augment(
    key: Key[Array, ""],
    images: Float[Array, "N H W C"],
    *,
    random_resized_crop: float = 0.0,
    shift: int = 0,
    flip: bool = False,
    erase: float = 0.0,
) -> Float[Array, "N H W C"]:
    """Changes each of the images (N, H, W, C) at random, on the device.

    Args:
        key: a random key.
        images: what is to be changed.
        random_resized_crop: 0, or the least share of the area of the box that an image is cut down
            to and that is made as large as the image was (Szegedy et al., 2015, arXiv:1409.4842).
            The share is uniform up to 1; the logarithm of the sides' ratio, as of 1 for the image,
            is uniform between those of 3/4 and 4/3, where the box fits. torchvision draws both
            anew instead when it does not, so that its boxes are smaller on average.
        shift: pixels by which an image is moved at most, along each axis; zeros come in.
        flip: mirror half of the images.
        erase: share of the images in which a rectangle becomes noise, uniform in [0, 1] (Zhong et
            al., 2017, arXiv:1708.04896). It has 0.02 to 0.4 of the area and sides of a ratio of 0.3
            to 1 / 0.3, rounded and cut off at the image's.
    """
    flip_key, shift_key = jax.random.split(key)
    if random_resized_crop:
        images = _random_resized_crop(jax.random.fold_in(key, 3), images, random_resized_crop)
    if flip:
        flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if shift:
        margin = ((0, 0), (shift, shift), (shift, shift), (0, 0))
        offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * shift + 1)

        def window(padded: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(padded, (*offset, 0), images.shape[1:])

        images = jax.vmap(window)(jnp.pad(images, margin), offsets)
    if erase:  # 0 and 1 would give the keys above once more
        images = _erase(jax.random.fold_in(key, 2), images, erase)
    return images


def resized_crop(
    images: Float[Array, "N H W C"], corners: Float[Array, "N 2"], sides: Float[Array, "N 2"]
) -> Float[Array, "N H W C"]:
    """Cuts a box out of each image and resizes it to the image's size.

    Bilinear, as ``PIL.Image.resize(..., box=...)``, which reads on beyond the border of the box. A
    box is magnified, so that nothing needs antialiasing.

    Args:
        images: float, (N, H, W, C).
        corners: top and left of each box, as shares of height and width, (N, 2).
        sides: its height and width, as shares of the image's, (N, 2).
    """

    # Two pixels along each axis take a CPU a fraction of the time of `jax.image`'s dense products.
    def resized(image: jax.Array, corner: jax.Array, side: jax.Array) -> jax.Array:
        for axis, size in enumerate(image.shape[:2]):
            centres = corner[axis] * size + (jnp.arange(size) + 0.5) * side[axis]
            position = jnp.clip(centres - 0.5, 0, size - 1)
            first = position.astype(jnp.int32)
            share = (position - first).astype(image.dtype).reshape(-1, *[1] * (2 - axis))
            low, high = (jnp.take(image, first + k, axis, mode="clip") for k in (0, 1))
            image = low + share * (high - low)
        return image

    return jax.vmap(resized)(images, corners, sides)


def mirrored_logits(
    classify: Callable[[jax.Array], Any], images: Float[Array, "N H W C"], flip: bool
) -> Float[Array, "N classes"]:
    """What a network makes of images (N, H, W, C) in evaluation.

    Args:
        classify: images -> logits.
        images: as the network takes them.
        flip: average each image's logits with those of its mirror image.
    """
    logits = classify(images)
    return (logits + classify(images[:, :, ::-1])) / 2 if flip else logits


def check_shape(images: Any) -> None:
    """Makes sure that images are (N, H, W, C).

    Raises:
        ValueError: when they have not four axes, or look like PyTorch's (N, C, H, W).
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, H, W, C), not {images.shape}")
    _, first, second, third = images.shape
    if first in (1, 3) and second == third > 4:
        raise ValueError(
            f"images must have shape (N, H, W, C); {images.shape} looks like PyTorch's "
            "(N, C, H, W): transpose by (0, 2, 3, 1)"
        )


def _random_resized_crop(key: jax.Array, images: jax.Array, smallest: float) -> jax.Array:
    keys = jax.random.split(key, 3)
    area = jax.random.uniform(keys[0], (len(images), 1), minval=smallest)
    largest = jnp.minimum(math.log(4 / 3), -jnp.log(area))  # a longer side would not fit
    ratio = jnp.exp(largest * jax.random.uniform(keys[1], area.shape, minval=-1))
    sides = jnp.sqrt(jnp.concatenate([area / ratio, area * ratio], axis=1))
    corners = jax.random.uniform(keys[2], sides.shape) * (1 - sides)
    return resized_crop(images, corners, sides)


def _erase(key: jax.Array, images: jax.Array, share: float) -> jax.Array:
    count, height, width, _ = images.shape
    keys = jax.random.split(key, 6)
    area = height * width * jax.random.uniform(keys[0], (count, 1), minval=0.02, maxval=0.4)
    largest = math.log(1 / 0.3)
    ratio = jnp.exp(jax.random.uniform(keys[1], (count, 1), minval=-largest, maxval=largest))

    def span(key: jax.Array, side: int, length: jax.Array) -> jax.Array:
        length = jnp.clip(jnp.round(length), 1, side)
        start = jnp.floor(jax.random.uniform(key, (count, 1)) * (side - length + 1))
        pixels = jnp.arange(side, dtype=start.dtype)[None]
        return (start <= pixels) & (pixels < start + length)

    rows = span(keys[2], height, jnp.sqrt(area * ratio))
    columns = span(keys[3], width, jnp.sqrt(area / ratio))
    chosen = jax.random.bernoulli(keys[4], share, (count, 1, 1, 1))
    noise = jax.random.uniform(keys[5], images.shape, images.dtype)
    return jnp.where(chosen & rows[:, :, None, None] & columns[:, None, :, None], noise, images)


def _resize_axis(images: jax.Array, axis: int, size: int) -> jax.Array:
    positions, weights = _taps(images.shape[axis], size)
    along = [1] * images.ndim
    along[axis] = size
    total = jnp.int32(1 << (PRECISION_BITS - 1))  # one half, so that the shift rounds
    for position, weight in zip(positions, weights, strict=True):
        pixels = jnp.take(images, position, axis).astype(jnp.int32)
        total += pixels * weight.reshape(along)
    return (total >> PRECISION_BITS).astype(jnp.uint8)


@functools.cache
def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Source positions and fixed-point weights, int32, each (taps, new), of a triangle filter."""
    scale = old / new
    support = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    first = np.maximum(np.floor(centres - support + 0.5), 0).astype(np.int32)
    last = np.minimum(np.floor(centres + support + 0.5), old).astype(np.int32)
    positions = first + np.arange((last - first).max())[:, None]
    weights = np.maximum(1 - np.abs((positions - centres + 0.5) / support), 0) * (positions < last)
    fixed = np.floor(weights / weights.sum(0) * (1 << PRECISION_BITS) + 0.5)
    return np.minimum(positions, old - 1).astype(np.int32), fixed.astype(np.int32)
