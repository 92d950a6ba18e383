"""A trained network from a folder: ``model, variables = from_pretrained("runs/mine")``.

The folder is that of a run, or any that holds its ``config.json`` and ``model.safetensors``. It may
come from a stranger: both files are checked before memory is taken for what they describe, no code
comes from them, and no link leads out of the folder.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from resnet_flax.data import FITS
from resnet_flax.errors import InputError, reason
from resnet_flax.machine.files import inside
from resnet_flax.nn.resnet import ResNet, describe_model, model_from_description
from resnet_flax.weights import (
    from_torch,
    load_safetensors,
    save_safetensors,
    to_torch,
    variable_shapes,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LARGEST_CONFIG = LARGEST_HEADER = 1_000_000  # bytes
BYTES_OF_FLOAT64 = 8
MOST_CLASSES, LONGEST_NAME, LONGEST_PATH = 10_000, 100, 1000
LARGEST_IMAGE = 1024  # pixels, as --image-size
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Network:
    """A network, and what it was trained to see and to tell apart.

    Attributes:
        model: of ``len(classes)`` classes.
        classes: their names, in the order of the logits.
        image_shape: (H, W, C) of the data set's images.
        image_size: height and width these are resized to, in pixels.
        flip: average each image's logits with those of its mirror image.
        dark_background: whether the data set's images are light things on a dark ground.
        dataset: its name, as of ``train.py --dataset``.
        seed: decides which of its images are for testing, where it does not say.
        fit: how a picture is made one of its images, as of `resnet_flax.data.Splits`.
    """

    model: ResNet
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    image_size: int
    flip: bool = False
    dark_background: bool = True
    dataset: str = "fashion_mnist"
    seed: int = 0
    fit: str = "pad"

    def as_json(self) -> dict[str, Any]:
        """Everything that rebuilds it, for a JSON file; initialisers do not matter any more."""
        return {
            **describe_model(self.model),
            "classes": list(self.classes),
            "image_shape": list(self.image_shape),
            "image_size": self.image_size,
            "flip": self.flip,
            "dark_background": self.dark_background,
            "dataset": self.dataset,
            "seed": self.seed,
            "fit": self.fit,
        }

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of `as_json`, for content from anywhere.

        Raises:
            ValueError: when a value is missing, of the wrong kind, or out of range.
        """
        if not isinstance(content, Mapping):
            raise ValueError('it has no table "network", as train.py writes it')
        content = {"fit": "pad", **content}  # which version 0.1.0 did, and did not write
        _require(content["fit"] in [*FITS], content, "fit")
        for name, low, high in (("image_size", 1, LARGEST_IMAGE), ("seed", 0, LARGEST_SEED)):
            value: Any = content.get(name)
            _require(type(value) is int and low <= value <= high, content, name)
        for name in ("flip", "dark_background"):
            _require(type(content.get(name)) is bool, content, name)
        shape: Any = content.get("image_shape")
        _require(isinstance(shape, list) and len(shape) == 3, content, "image_shape")
        sides = (type(side) is int and 1 <= side <= LARGEST_IMAGE for side in shape)
        _require(all(sides), content, "image_shape")
        classes: Any = content.get("classes")
        _require(isinstance(classes, list), content, "classes")
        _require(1 <= len(classes) <= MOST_CLASSES, content, "classes")
        _require(_printable(content.get("dataset"), LONGEST_PATH), content, "dataset")
        _require(all(_printable(name, LONGEST_NAME) for name in classes), content, "classes")
        return cls(
            model=model_from_description(content, len(classes)),
            classes=tuple(classes),
            image_shape=(shape[0], shape[1], shape[2]),
            image_size=content["image_size"],
            flip=content["flip"],
            dark_background=content["dark_background"],
            dataset=content["dataset"],
            seed=content["seed"],
            fit=content["fit"],
        )


def from_pretrained(path: str | os.PathLike[str]) -> tuple[ResNet, dict[str, Any]]:
    """Loads a trained network.

    Call it as ``model.apply(variables, images)``, images float32 in [0, 1] of shape (N, H, W, C).

    Args:
        path: a run folder, or one with its ``config.json`` and ``model.safetensors``.

    Returns:
        The network, and its variables ``{"params": ..., "batch_stats": ...}``, float32.

    Raises:
        InputError: when a file is missing, unreadable, damaged, or not of the network.
    """
    network, variables = read_pretrained(path)
    return network.model, variables


def read_pretrained(path: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """As `from_pretrained`, with all that is known about the network."""
    config, weights = (_inside(Path(path), name) for name in (CONFIG, WEIGHTS))
    network = _read_network(config)
    channels = network.image_shape[-1]
    try:
        shapes = variable_shapes(network.model, channels)
    except Exception as error:  # of many kinds: fields that are fine may not fit together
        why = reason(error)
        raise InputError(f"{config} describes no network that can be built: {why}") from error
    values = sum(math.prod(spec.shape) for spec in shapes.values())
    needed = values * BYTES_OF_FLOAT64 + LARGEST_HEADER
    if (size := weights.stat().st_size) > needed:
        raise InputError(f"{weights} has {size:,} bytes; the network of {config} needs less")
    try:
        variables = from_torch(network.model, load_safetensors(weights), in_channels=channels)
    except InputError as error:
        raise InputError(f"{weights}: {reason(error, 1000)}") from error
    return network, variables


def save_weights(folder: Path, network: Network, variables: Mapping[str, Any]) -> None:
    """Writes a network's ``model.safetensors``, with PyTorch's names and order of axes.

    Raises:
        InputError: when the file cannot be written.
    """
    layout = "torchvision" if network.model.norm_shortcut else "d2l"
    save_safetensors(folder / WEIGHTS, to_torch(network.model, variables, layout))


def _read_network(path: Path) -> Network:
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_CONFIG + 1)
        if len(text) > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        content = json.loads(text)
        return Network.from_json(content.get("network") if isinstance(content, dict) else None)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} describes no network: {reason(error)}") from error


def _inside(folder: Path, name: str) -> Path:
    """A folder's own plain file; opening a pipe would wait for ever.

    Raises:
        InputError: when it is none.
    """
    path = folder / name
    try:
        real = inside(folder, path)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds no trained network: cannot read {name} ({reason(error)})"
        ) from error
    if not real.is_file():
        raise InputError(f"{path} is not a file")
    return real


def _printable(text: Any, most: int) -> bool:
    """Whether it is text without line breaks, and without what steers a terminal."""
    return isinstance(text, str) and text.isprintable() and 1 <= len(text) <= most


def _require(fine: bool, content: Mapping[str, Any], name: str) -> None:
    if not fine:
        raise ValueError(f"{name} cannot be {content.get(name)!r:.100}")
