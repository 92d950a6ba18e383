"""The names of weights: which key of a PyTorch state dict is which leaf of the variables.

Submodules are named after torchvision's keys, so that a key follows from a leaf by renaming its
last segment; the other layouts of keys replace prefixes.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate, takewhile
from typing import Any

from resnet_flax.errors import InputError

# A leaf's place in the variables, such as ("params", "layer1", "0", "conv1", "kernel").
Leaf = tuple[str, ...]
HEAD: tuple[Leaf, ...] = (("params", "fc", "kernel"), ("params", "fc", "bias"))
MOST_WRAPPERS = 10  # segments of a prefix
# What PyTorch puts into a key where a part of a network is compiled, sharded or computed again.
WRAPPER = re.compile(r"(?<=\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
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
    """The key of every leaf, and of a dense layer, in the layout that fits a state dict best.

    Of a network and its average (EMA) the network is taken.

    Raises:
        InputError: when several networks fit as well.
    """
    leaves = dict.fromkeys([*leaves, *HEAD])
    layouts = [torch_keys(leaves, layout) for layout in LAYOUTS]
    given = {WRAPPER.sub("", key): key for key in state_dict}
    fits: dict[str, tuple[set[str], dict[Leaf, str]]] = {}  # by prefix, the best layout's
    for prefix in _prefixes(given):
        candidates = [{leaf: prefix + key for leaf, key in keys.items()} for keys in layouts]
        found = [(given.keys() & {*keys.values()}, keys) for keys in candidates]
        fits[prefix] = max(found, key=lambda fit: len(fit[0]))
    most = max(len(found) for found, _ in fits.values())
    best = [prefix for prefix, (found, _) in fits.items() if len(found) == most]
    best = [prefix for prefix in best if not averaged(prefix)] or best
    first = fits[best[0]][0]  # another layout's prefix may tell of the same keys
    others = [prefix for prefix in best if first.isdisjoint(fits[prefix][0])]
    if others and 2 * most > len(leaves):
        names = listed([best[0], *others])
        raise InputError(f"the state dict holds several networks, in {names}: choose one by `part`")
    return {leaf: given.get(key, key) for leaf, key in fits[best[0]][1].items()}


def averaged(name: str) -> bool:
    """Whether a name is that of a moving average of weights."""
    return bool(re.search("(^|[^a-z])ema|ema($|[^a-z])", name.lower()))


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
    """The prefixes that more than a third of the keys share: of two networks, each has one."""
    prefixes = [""]
    for prefix in prefixes:  # to which longer ones are added
        if prefix.count(".") < MOST_WRAPPERS:
            rest = (key[len(prefix) :] for key in keys if key.startswith(prefix))
            firsts = Counter(first for first, dot, _ in (key.partition(".") for key in rest) if dot)
            shared = (first for first, count in firsts.items() if 3 * count > len(keys))
            prefixes += [f"{prefix}{first}." for first in shared]
    return prefixes
