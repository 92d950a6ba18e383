"""A trained network from a folder or by name: ``model, variables = from_pretrained("runs/mine")``.

A folder is that of a run, or any that holds a ``config.json`` and ``model.safetensors``, as they
come from resnet_flax, timm and transformers. It may come from a stranger: both files are checked
before memory is taken for what they describe, no code comes from them, and no link leads out of the
folder. A name is a repository's on the Hugging Face hub, such as ``timm/resnet18.a1_in1k`` or
``microsoft/resnet-50@REVISION``, or one of torchvision's, such as ``torchvision/resnet50``.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from resnet_flax.data import FITS, INTERPOLATIONS, Resizing
from resnet_flax.errors import InputError, reason
from resnet_flax.inference import hub
from resnet_flax.inference.foreign_configs import (
    MOST_CLASSES,
    PREPROCESSOR,
    foreign,
    foreign_network,
    torchvision_network,
)
from resnet_flax.machine.files import inside
from resnet_flax.machine.runtime import start_backend
from resnet_flax.nn.preprocessing import Normalization
from resnet_flax.nn.resnet import ResNet, describe_model, model_from_description
from resnet_flax.weights import (
    from_torch,
    read_checkpoint,
    save_safetensors,
    to_torch,
    variable_shapes,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LARGEST_CONFIG, LARGEST_HEADER = 10_000_000, 1_000_000  # bytes; ImageNet-22k's names have 1.2 MB
LONGEST_NAME, LONGEST_PATH = 300, 1000
LARGEST_IMAGE = 1024  # pixels, as --image-size
LARGEST_SEED = 2**32 - 1
TORCHVISION = "torchvision/"  # begins the names of its weights


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
        resizing: how it is in the place of that, where the network was pretrained elsewhere, or by
            a recipe with a ``crop_share``.
        normalization: of the channels of images in [0, 1].
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
    resizing: Resizing | None = None
    normalization: Normalization | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything that rebuilds it, for a JSON file; initialisers do not matter any more."""
        own = {name: getattr(self, name) for name in self._own_fields()}
        lists = {"classes": list(self.classes), "image_shape": list(self.image_shape)}
        resizing, normalization = self.resizing, self.normalization
        tables = {
            "resizing": resizing and resizing._asdict(),
            "normalization": normalization
            and {name: list(values) for name, values in normalization._asdict().items()},
        }
        return describe_model(self.model) | own | lists | tables

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of `as_json`, for content from anywhere.

        Raises:
            ValueError: when a value is missing, of the wrong kind, or out of range.
        """
        if not isinstance(content, Mapping):
            raise ValueError('it has no table "network", as train.py writes it')
        # What version 0.1.0 did, and did not write.
        content = {"fit": "pad", "resizing": None, "normalization": None, **content}
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
        if fine["image_shape"]:
            own["resizing"] = _resizing(own["resizing"], shape)
            own["normalization"] = _normalization(own["normalization"], shape[-1])
        for name, is_fine in fine.items():
            if not is_fine:
                raise ValueError(f"{name} cannot be {own[name]!r:.100}")
        own |= {"classes": tuple(classes), "image_shape": tuple(shape)}
        return cls(model=model_from_description(content, len(classes)), **own)

    @classmethod
    def _own_fields(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.name != "model"]


def from_pretrained(where: str | os.PathLike[str]) -> tuple[ResNet, dict[str, Any]]:
    """Loads a trained network by name or folder, and its ``{"params", "batch_stats"}``, float32.

    Call it as ``model.apply(variables, images)``, images float32 in [0, 1] of shape (N, H, W, C),
    normalised as the network's `Network.normalization` says: `read_pretrained` has it, and
    `resnet_flax.inference.read_images` makes such images of files.

    Raises:
        InputError: when a file is missing, unreadable, damaged, or not of the network; when the
            network is none that `ResNet` can be; when a name cannot be fetched.
    """
    network, variables = read_pretrained(where)
    return network.model, variables


def read_pretrained(where: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """As `from_pretrained`, with all that is known about the network."""
    network = read_network(where)
    channels = network.image_shape[-1]
    start_backend()
    try:
        shapes = variable_shapes(network.model, channels)
    except Exception as error:  # of many kinds: fields that are fine may not fit together
        why = reason(error)
        raise InputError(f"{where} describes no network that can be built: {why}") from error
    values = sum(math.prod(spec.shape) for spec in shapes.values())
    state_dict = read_tensors(where, 8 * values + LARGEST_HEADER)  # of float64
    try:
        return network, from_torch(network.model, state_dict, in_channels=channels)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def read_network(where: str | os.PathLike[str]) -> Network:
    """The network of a folder or a name, without its weights.

    Raises:
        InputError: as `from_pretrained`.
    """
    if not hub.is_name(where):
        folder = Path(where)
        config = _inside(folder, CONFIG)
        other = _inside(folder, PREPROCESSOR) if (folder / PREPROCESSOR).exists() else None
        return _read_network(config, config, other)
    if where.startswith(TORCHVISION):
        return Network.from_json(torchvision_network(hub.torchvision_set(where)))
    if (fetched := hub.fetch(where, CONFIG)) is None:
        raise InputError(f"{where} has no {CONFIG}, which would tell the network")
    return _read_network(where, fetched, hub.fetch(where, PREPROCESSOR))


def read_tensors(where: str | os.PathLike[str], most: float = math.inf) -> dict[str, Any]:
    """The state dict of a folder or a name.

    Raises:
        InputError: as `from_pretrained`, and when its files have more than so many bytes.
    """
    if not hub.is_name(where):
        files = [_inside(Path(where), WEIGHTS)]
    elif where.startswith(TORCHVISION):
        files = [hub.torchvision_weights(where)]
    else:
        files = hub.fetch_weights(where)
    if (size := sum(file.stat().st_size for file in files)) > most:
        raise InputError(f"{files[0]} has {size:,} bytes; the network of {where} needs less")
    state_dict: dict[str, Any] = {}
    for file in files:
        state_dict |= read_checkpoint(file)
    return state_dict


def save_weights(folder: Path, network: Network, variables: Mapping[str, Any]) -> None:
    """Writes a network's ``model.safetensors``, with PyTorch's names and order of axes.

    Raises:
        InputError: when the file cannot be written.
    """
    layout = "torchvision" if network.model.norm_shortcut else "d2l"
    save_safetensors(folder / WEIGHTS, to_torch(network.model, variables, layout))


def _read_network(source: str | Path, config: Path, preprocessor: Path | None) -> Network:
    """Whoever wrote the files."""
    try:
        content = _read_json(config)
        if not isinstance(content, dict) or not foreign(content):
            return Network.from_json(content.get("network") if isinstance(content, dict) else None)
        described = foreign_network(content, _read_json(preprocessor) if preprocessor else None)
        return Network.from_json(described)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{source} describes no network: {reason(error, 1000)}") from error


def _read_json(path: Path) -> Any:
    with path.open("rb") as file:
        text = file.read(LARGEST_CONFIG + 1)
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
    return json.loads(text)


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


def _resizing(content: Any, shape: list[int]) -> Resizing | None:
    if content is None:
        return None
    fine = isinstance(content, Mapping) and content.keys() == set(Resizing._fields)
    fine = fine and (
        _whole(content["side"], max(shape[:2]), 2 * LARGEST_IMAGE)
        and shape[0] == shape[1]
        and content["interpolation"] in INTERPOLATIONS
        and type(content["squash"]) is type(content["rounds_down"]) is bool
    )
    if not fine:
        raise ValueError(f"resizing cannot be {content!r:.100}")
    return Resizing(**content)


def _normalization(content: Any, channels: int) -> Normalization | None:
    if content is None:
        return None
    fine = isinstance(content, Mapping) and content.keys() == set(Normalization._fields)
    fine = fine and all(
        isinstance(content[name], list)
        and len(content[name]) == channels
        and all(type(n) in (int, float) and least <= n <= 10 for n in content[name])
        for name, least in (("mean", -10), ("std", 1e-6))
    )
    if not fine:
        raise ValueError(f"normalization cannot be {content!r:.100}")
    return Normalization(*(tuple(map(float, content[name])) for name in Normalization._fields))


def _printable(text: Any, most: int) -> bool:
    """Whether it is text without line breaks, and without what steers a terminal."""
    return isinstance(text, str) and text.isprintable() and 1 <= len(text) <= most


def _whole(number: Any, low: int, high: int) -> bool:
    return type(number) is int and low <= number <= high
