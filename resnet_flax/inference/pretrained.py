"""A trained network from a folder: ``model, variables = from_pretrained("runs/mine")``.

The folder is that of a run, or any that holds its ``config.json`` and ``model.safetensors``. It may
come from a stranger: both files are checked before memory is taken for what they describe, no code
comes from them, and no link leads out of the folder.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from resnet_flax.data import FITS
from resnet_flax.errors import InputError, reason
from resnet_flax.machine.files import inside
from resnet_flax.machine.runtime import start_backend
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
MOST_CLASSES, LONGEST_NAME, LONGEST_PATH = 10_000, 100, 1000
LARGEST_IMAGE = 1024  # pixels, as --image-size
LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
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
        own = {name: getattr(self, name) for name in self._own_fields()}
        lists = {"classes": list(self.classes), "image_shape": list(self.image_shape)}
        return describe_model(self.model) | own | lists

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of `as_json`, for content from anywhere.

        Raises:
            ValueError: when a value is missing, of the wrong kind, or out of range.
        """
        if not isinstance(content, Mapping):
            raise ValueError('it has no table "network", as train.py writes it')
        content = {"fit": "pad", **content}  # which version 0.1.0 did, and did not write
        own = {name: content.get(name) for name in cls._own_fields()}
        classes, shape = own["classes"], own["image_shape"]
        fine = {
            "fit": own["fit"] in [*FITS],
            "image_size": _whole(own["image_size"], 1, LARGEST_IMAGE),
            "seed": _whole(own["seed"], 0, LARGEST_SEED),
            "flip": type(own["flip"]) is bool,
            "dark_background": type(own["dark_background"]) is bool,
            "dataset": _printable(own["dataset"], LONGEST_PATH),
            "image_shape": isinstance(shape, list)
            and len(shape) == 3
            and all(_whole(side, 1, LARGEST_IMAGE) for side in shape),
            "classes": isinstance(classes, list)
            and 1 <= len(classes) <= MOST_CLASSES
            and all(_printable(name, LONGEST_NAME) for name in classes),
        }
        for name, is_fine in fine.items():
            if not is_fine:
                raise ValueError(f"{name} cannot be {own[name]!r:.100}")
        own |= {"classes": tuple(classes), "image_shape": tuple(shape)}
        return cls(model=model_from_description(content, len(classes)), **own)

    @classmethod
    def _own_fields(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.name != "model"]


def from_pretrained(path: str | os.PathLike[str]) -> tuple[ResNet, dict[str, Any]]:
    """Loads a trained network from its folder, and its ``{"params", "batch_stats"}``, float32.

    Call it as ``model.apply(variables, images)``, images float32 in [0, 1] of shape (N, H, W, C).

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
    start_backend()
    try:
        shapes = variable_shapes(network.model, channels)
    except Exception as error:  # of many kinds: fields that are fine may not fit together
        why = reason(error)
        raise InputError(f"{config} describes no network that can be built: {why}") from error
    values = sum(math.prod(spec.shape) for spec in shapes.values())
    needed = 8 * values + LARGEST_HEADER  # of float64
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
    """A folder's own plain file; opening a pipe would wait for ever."""
    path = folder / name
    try:
        real = inside(folder, path)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        why = f"cannot read {name} ({reason(error)})"
        raise InputError(f"{folder} holds no trained network: {why}") from error
    if not real.is_file():
        raise InputError(f"{path} is not a file")
    return real


def _printable(text: Any, most: int) -> bool:
    """Whether it is text without line breaks, and without what steers a terminal."""
    return isinstance(text, str) and text.isprintable() and 1 <= len(text) <= most


def _whole(number: Any, low: int, high: int) -> bool:
    return type(number) is int and low <= number <= high
