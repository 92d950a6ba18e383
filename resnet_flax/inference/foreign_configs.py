"""What timm's, transformers' and torchvision's networks are, told as our ``config.json`` tells it.

What a configuration asks for and this package has not is refused by name. That matters most where
the weights would load: an anti-aliased or a dilated network has the very keys of a plain one.
"""

import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from resnet_flax.data import INTERPOLATIONS, Resizing
from resnet_flax.errors import reason
from resnet_flax.inference.hub import TorchvisionWeights
from resnet_flax.nn.blocks import Bottleneck, Residual
from resnet_flax.nn.preprocessing import IMAGENET_NORMALIZATION
from resnet_flax.nn.resnet import ARCHITECTURES, ResNet, build_model, describe_model

PREPROCESSOR = "preprocessor_config.json"
IMAGENET = "imagenet2012"  # TFDS' name
MEAN, STD = IMAGENET_NORMALIZATION
UNKNOWN = "unknown"  # data set
MOST_CLASSES = 100_000


def foreign(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is timm's or transformers', and not this package's."""
    return "network" not in config and ("architecture" in config or "model_type" in config)


def foreign_network(config: Mapping[str, Any], preprocessor: Any) -> dict[str, Any]:
    """The network of timm's or transformers' ``config.json``, as of `Network.as_json`.

    Args:
        config: what the file holds.
        preprocessor: what transformers' ``preprocessor_config.json`` holds, if there is one.

    Raises:
        ValueError: when it describes something else than this package's networks.
    """
    try:
        if "architecture" in config:
            return _timm_network(config)
        return _transformers_network(config, preprocessor)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"a value is missing or of the wrong kind ({reason(error)})") from error


def torchvision_network(weights: TorchvisionWeights) -> dict[str, Any]:
    """The network of a set of torchvision's weights, as of `Network.as_json`."""
    resizing = Resizing(weights.resize)._asdict()
    model = build_model(weights.architecture, "torchvision", num_classes=1000)
    return _described(model, imagenet_classes(), 224, resizing, MEAN, STD)


@cache
def imagenet_classes() -> list[str]:
    """The names of ImageNet-1k's classes, in the order of everyone's logits."""
    names = resources.files("resnet_flax.inference").joinpath("imagenet_classes.txt")
    return names.read_text("utf-8").splitlines()[1:]  # the first line tells the source


def _timm_network(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = config["architecture"]
    # Those with a small stem are of this package alone.
    known = [name for name, fields in ARCHITECTURES.items() if fields.get("stem") != "small"]
    if architecture not in known:
        supported = ", ".join(known)
        raise ValueError(
            f"timm's {architecture!r:.100} is not supported: of timm's are {supported}"
        )
    told = config.get("pretrained_cfg", config)
    arguments = dict(config.get("model_args") or {})
    channels = arguments.pop("in_chans", 3)
    if arguments.setdefault("global_pool", config.get("global_pool") or "avg") == "avg":
        del arguments["global_pool"]
    for name in ("num_classes", "drop_rate", "drop_path_rate"):  # nothing to a trained network
        arguments.pop(name, None)
    if arguments:
        raise ValueError(f"timm's {architecture} with {arguments!r:.100} is not supported")
    _, height, width = told.get("input_size") or (3, 224, 224)
    mode = told.get("crop_mode") or "center"
    if mode not in ("center", "squash") or height != width:
        raise ValueError(f"images of {height}x{width} in crop_mode {mode!r:.100} are not supported")
    resizing = {
        "side": math.floor(height / (told.get("crop_pct") or 0.875)),
        "squash": mode == "squash",
        "interpolation": told.get("interpolation") or "bicubic",
        "rounds_down": False,
    }
    count = config.get("num_classes", told.get("num_classes", 1000))
    names = config.get("label_names") or told.get("label_names")
    texts = config.get("label_descriptions") or told.get("label_descriptions") or {}
    classes = None
    if not 0 <= count <= MOST_CLASSES:
        raise ValueError(f"num_classes cannot be {count!r:.100}")
    if isinstance(names, Mapping):
        names = [names.get(str(n), f"class {n}") for n in range(count)]
    if isinstance(names, list) and isinstance(texts, Mapping):
        classes = [texts.get(name, name) for name in names]
    mean, std = ((told.get(name) or known) for name, known in (("mean", MEAN), ("std", STD)))
    if channels == 1:
        mean, std = mean[:1], std[:1]
    model = build_model(architecture, "torchvision", num_classes=count)
    return _described(model, classes, height, resizing, mean, std)


def _transformers_network(config: Mapping[str, Any], preprocessor: Any) -> dict[str, Any]:
    kind = config["model_type"]
    if kind != "resnet":
        raise ValueError(f"transformers' {kind!r:.100} is not supported: its 'resnet' is")
    sizes, block = config["hidden_sizes"], {"basic": Residual, "bottleneck": Bottleneck}
    layer = block[config.get("layer_type", "bottleneck")]
    channels = config.get("embedding_size", 64)
    factor = 4 if layer is Bottleneck else 1
    regular = sizes == [channels * factor * 2**n for n in range(len(sizes))]
    activation = config.get("hidden_act", "relu")
    if not regular or activation != "relu" or config.get("downsample_in_first_stage"):
        raise ValueError(
            f"transformers' resnet with hidden_sizes {sizes!r:.100}, embedding_size {channels}, "
            f"hidden_act {activation!r:.100} and downsample_in_first_stage "
            f"{config.get('downsample_in_first_stage', False)} is not supported"
        )
    names = config.get("id2label") or {}
    classes = [names[str(n)] for n in range(len(names))] or None
    model = ResNet(
        config["depths"],
        layer,
        num_classes=len(names),
        use_bias=False,
        norm_shortcut=True,
        channels=channels,
        stride_first=bool(config.get("downsample_in_bottleneck", False)),
    )
    size, resizing, mean, std = _transformers_images(preprocessor or {})
    return _described(model, classes, size, resizing, mean, std)


def _transformers_images(told: Mapping[str, Any]) -> tuple[int, dict[str, Any], Any, Any]:
    """Image size, resizing, mean and standard deviation of its processor for images."""
    name = told.get("image_processor_type") or told.get("feature_extractor_type") or "ConvNext"
    size = told.get("size", 224)
    if name.startswith("ConvNext"):
        size = size["shortest_edge"] if isinstance(size, Mapping) else size
        squash = size >= 384
        side = size if squash else int(size / told.get("crop_pct", 224 / 256))
    elif name.startswith("ViT"):
        side = size = size["height"] if size["height"] == size["width"] else None
        squash = True
    elif name.startswith("Bit"):
        side, size, squash = size["shortest_edge"], told["crop_size"]["height"], False
    else:
        raise ValueError(f"transformers' {name!r:.100} is not supported")
    missing = [
        step for step in ("do_resize", "do_rescale", "do_normalize") if told.get(step, 1) != 1
    ]
    if missing or not math.isclose(told.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(f"transformers' {name!r:.100} without {missing} is not supported")
    number = told.get("resample", 2 if name.startswith("ViT") else 3)
    resizing = {
        "side": side,
        "squash": squash,
        "interpolation": INTERPOLATIONS[number],
        "rounds_down": True,
    }
    return size, resizing, told.get("image_mean", MEAN), told.get("image_std", STD)


def _described(
    model: ResNet, classes: list[str] | None, size: int, resizing: Any, mean: Any, std: Any
) -> dict[str, Any]:
    imagenet = model.num_classes == 1000
    if not classes:
        numbered = [f"class {n}" for n in range(model.num_classes)]
        classes = imagenet_classes() if imagenet else numbered
    return describe_model(model) | {
        "classes": classes,
        "image_shape": [size, size, len(mean)],
        "image_size": size,
        "flip": False,
        "dark_background": False,
        "dataset": IMAGENET if imagenet else UNKNOWN,
        "seed": 0,
        "fit": "crop",
        "resizing": resizing,
        "normalization": {"mean": list(mean), "std": list(std)},
    }
