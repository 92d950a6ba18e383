"""The names of weights: which key of a PyTorch state dict is which leaf of the variables.

Submodules are named after torchvision's keys, so that a key follows from a leaf by renaming its
last segment; the other layouts of keys replace prefixes.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate, takewhile
from typing import Any

# A leaf's place in the variables, such as ("params", "layer1", "0", "conv1", "kernel").
Leaf = tuple[str, ...]
HEAD: tuple[Leaf, ...] = (("params", "fc", "kernel"), ("params", "fc", "bias"))
MOST_WRAPPERS = 10  # segments of a prefix
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

_HUGGING_FACE_BASE = (
    ("^conv1", "embedder.embedder.convolution"),
    ("^bn1", "embedder.embedder.normalization"),
    *((rf"^layer{n}\.(\d+)", rf"encoder.stages.{n - 1}.layers.\1") for n in range(1, 10)),
    *((rf"\.conv{n}\.", f".layer.{n - 1}.convolution.") for n in (1, 2, 3)),
    *((rf"\.bn{n}\.", f".layer.{n - 1}.normalization.") for n in (1, 2, 3)),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    ("^fc", "classifier.1"),
)
LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    # torchvision's networks and timm's.
    "torchvision": (),
    # D2L's Sequential; two layers without weights come between the stages and the dense layer.
    "d2l": (("^conv1", "0.0"), ("^bn1", "0.1"), ("^layer", ""), (r"^fc\.", "{stages_plus_3}.")),
    # The class ResNet of D2L's edition 1.0.
    "d2l_class": (
        ("^conv1", "net.0.0"),
        ("^bn1", "net.0.1"),
        *((rf"^layer{n}\.", f"net.b{n + 1}.") for n in range(1, 10)),
        ("^fc", "net.last.2"),
    ),
    # d2l.resnet18 of the d2l package.
    "d2l_package": (("^conv1", "0"), ("^bn1", "1"), ("^layer", "resnet_block"), ("^fc", "fc.1")),
    # transformers' ResNetForImageClassification, and its ResNetModel, which has no dense layer.
    "huggingface": (*_HUGGING_FACE_BASE, ("^(embedder|encoder)", r"resnet.\1")),
    "huggingface_base": _HUGGING_FACE_BASE,
}
"""Layout -> what to replace by what, in this order, in torchvision's keys."""


def torch_keys(leaves: Iterable[Leaf], layout: str) -> dict[Leaf, str]:
    """The key of every leaf of a network in one of the `LAYOUTS`."""
    keys = {leaf: ".".join((*leaf[1:-1], LEAVES.get(leaf[-1], leaf[-1]))) for leaf in leaves}
    stages = len({leaf[1] for leaf in keys if leaf[1].startswith("layer")})
    rules = list(LAYOUTS[layout]) if stages else []  # a block alone has no stem or dense layer
    if layout != "torchvision" and not any("downsample.0." in key for key in keys.values()):
        # Only timm gives a shortcut's pooling a number, and so puts the convolution's up by one.
        pooled = ((rf"\bdownsample\.{n + 1}\.", f"downsample.{n}.") for n in (0, 1))
        rules = [*pooled, *rules]
    if layout.startswith("d2l") and not any("conv3." in key for key in keys.values()):
        # D2L's block calls its shortcut conv3, unless that is a bottleneck's third convolution.
        rules.append((r"\bdownsample\.0\.", "conv3."))
    for old, new in rules:
        new = new.replace("{stages_plus_3}", str(stages + 3))
        keys = {leaf: re.sub(old, new, key) for leaf, key in keys.items()}
    return keys


def match_keys(leaves: Iterable[Leaf], state_dict: Mapping[str, Any]) -> dict[Leaf, str]:
    """The key of every leaf, and of a dense layer, in the layout that fits a state dict best."""
    leaves = dict.fromkeys([*leaves, *HEAD])
    layouts = [torch_keys(leaves, layout) for layout in LAYOUTS]
    candidates = [
        {leaf: prefix + key for leaf, key in keys.items()}
        for prefix in _prefixes(state_dict)
        for keys in layouts
    ]
    return max(candidates, key=lambda keys: len(state_dict.keys() & set(keys.values())))


def common_prefix(keys: Iterable[str]) -> str:
    """The first segments of all keys, as far as they are the same, each with its dot."""
    segments = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    common = takewhile(lambda parts: len({*parts}) == 1, segments)
    return "".join(f"{parts[0]}." for parts in common)


def listed(names: Collection[str], room: int = 200) -> str:
    """The first names that have room in a line, escaped, and how many more there are."""
    escaped = [name.encode("unicode_escape").decode()[:room] for name in names]
    shown = sum(length <= room for length in accumulate(map(len, escaped))) or 1
    more = f" and {len(escaped) - shown} more" if len(escaped) > shown else ""
    return ", ".join(escaped[:shown]) + more


def _prefixes(keys: Collection[str]) -> list[str]:
    """The prefixes that most keys share, from the empty one to the longest."""
    prefixes = [""]
    for _ in range(MOST_WRAPPERS):
        rest = (key[len(prefixes[-1]) :] for key in keys if key.startswith(prefixes[-1]))
        firsts = Counter(first for first, dot, _ in (key.partition(".") for key in rest) if dot)
        shared = [f"{first}." for first, count in firsts.items() if 2 * count > len(keys)]
        if not shared:
            break
        prefixes.append(prefixes[-1] + shared[0])
    return prefixes
