"""Weights from elsewhere: which network they are of, fitted to another, in another layout."""

import logging
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax.typing import Dtype

from resnet_flax.errors import InputError
from resnet_flax.nn.blocks import Bottleneck
from resnet_flax.nn.resnet import STEMS, ResNet, build_model
from resnet_flax.weights.keys import HEAD, match_keys
from resnet_flax.weights.state_dict import counted, from_torch, match, stem_kernel, to_torch

logger = logging.getLogger(__name__)


def guess_model(
    name: str, state_dict: Mapping[str, Any], flavour: str | None = None, **fields: Any
) -> ResNet:
    """Builds the network of a state dict in any layout, as `build_model` does.

    Convolutions with biases make the flavour d2l, the dense layer tells the number of classes, and
    the shapes tell stem, groups and widths where these are not the named network's. ``fields`` win.

    Raises:
        InputError: when a name is unknown, or a stem of 3x3 could be one of two.
    """
    flavour = flavour or ("d2l" if _has_biases(state_dict) else "torchvision")
    named = build_model(name, flavour, **fields)
    told = _told_by_shapes(named, state_dict, fields)
    classes = told.pop("num_classes")
    other = {field: value for field, value in told.items() if value != getattr(named, field)}
    if other:
        listed = ", ".join(f"{field}={value!r}" for field, value in other.items())
        logger.info("the weights are those of %s with %s", name, listed)
    return build_model(name, flavour, num_classes=classes, **fields, **other)


def start_from(
    source: str, state_dict: Mapping[str, Any], model: ResNet, *, channels: int, seed: int
) -> dict[str, Any]:
    """The variables that a training starts from: a state dict fitted to a network and its images.

    Its keys are in any of the `LAYOUTS`; ``source`` is what messages call it. A dense layer for
    another number of classes is drawn anew, by the seed; a stem for another number of
    channels is summed (to one) or replicated, as `from_torch` does it.

    Raises:
        InputError: when it is of another network.
    """
    logger.info("start from %s", source)
    weights = match(model, state_dict, channels)
    leaves = stem_kernel(weights.expected), HEAD[1]
    stem, head = (weights.tensors.get(weights.keys[leaf]) for leaf in leaves)
    biased = _has_biases(weights.tensors)
    if stem is not None and biased != model.use_bias:
        raise InputError(
            f"{source} is of another flavour: its convolutions have "
            f"{'biases' if biased else 'no biases'}; choose `flavour` to fit"
        )
    adapted: Literal["sum", "replicate"] | None = None
    if stem is not None and stem.ndim == 4 and stem.shape[1] != channels:
        adapted = "sum" if channels == 1 else "replicate"
    same_head = head is not None and head.shape[:1] == (model.num_classes,)
    try:
        new_head = None if same_head else seed
        return from_torch(
            model, weights, in_channels=channels, adapt_stem=adapted, new_head=new_head
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def convert(
    model: ResNet, state_dict: Mapping[str, Any], layout: str, dtype: Dtype | None = None
) -> dict[str, np.ndarray]:
    """Rewrites a state dict of the model in another of the `LAYOUTS`, or dtype.

    Raises:
        InputError: when the state dict is not the model's.
    """
    # With 64 bits a float64 checkpoint stays one; the others keep their dtype all the same.
    with jax.enable_x64(True):
        weights = match(model, state_dict, in_channels=1)
        variables = from_torch(model, weights, dtype=dtype or "keep")
        tensors = weights.tensors.items()
        counts = {counted(k, value) for k, value in tensors if k.endswith("num_batches_tracked")}
        count = max(counts, default=0)
        if len(counts) > 1:
            logger.info(
                f"num_batches_tracked differed between layers ({sorted(counts)}): wrote {count}"
            )
        return to_torch(model, variables, layout, num_batches_tracked=count)


def _told_by_shapes(
    model: ResNet, state_dict: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """The fields, but those given, of a network that has the model's depth and blocks."""
    stage, bottleneck = len(model.stage_sizes), model.block is Bottleneck
    layers = ("conv1", "conv2", *(["conv3"] if bottleneck else []), "downsample/0", "downsample/1")
    paths = ["conv1", "conv1/0", "conv1/6", *(f"layer{stage}/0/{layer}" for layer in layers)]
    paths += [f"layer{number}/0/conv1" for number in range(1, stage)]  # D2L numbers what follows
    leaves = {path: ("params", *path.split("/"), "kernel") for path in paths}
    keys = match_keys(leaves.values(), state_dict)
    found = {path: np.shape(state_dict.get(keys[leaf], ())) for path, leaf in leaves.items()}
    shapes = {path: shape for path, shape in found.items() if len(shape) == 4 and all(shape)}

    head = np.shape(state_dict.get(keys[HEAD[0]], ()))
    told: dict[str, Any] = {"num_classes": head[0] if len(head) == 2 else 0}
    if "conv1/0" in shapes:
        told["stem"] = "deep"
    elif "conv1" in shapes and "stem" not in given:
        side = shapes["conv1"][-1]
        stems = [name for name, stem in STEMS.items() if stem[0] == side and name != "deep"]
        if len(stems) > 1 and model.stem not in stems:
            raise InputError(f"which `stem` has kernels of {side}x{side}, {' or '.join(stems)}?")
        told["stem"] = model.stem if model.stem in stems or not stems else stems[0]
    if f"layer{stage}/0/downsample/1" in shapes:
        told["average_shortcut"] = True
    stem = shapes.get("conv1/6", shapes.get("conv1"))
    conv = shapes.get(f"layer{stage}/0/conv{2 if bottleneck else 1}")
    if stem and conv:
        told["channels"] = stem[0]
        groups = max(1, conv[0] // conv[1]) if bottleneck else 1
        width = conv[0] / groups / (stem[0] * 2 ** (stage - 1))
        if bottleneck:
            told["groups"] = groups
        if bottleneck and (64 * width).is_integer():
            told |= {"width_per_group": int(64 * width), "width_multiplier": 1.0}
        else:
            told |= {"width_per_group": 64, "width_multiplier": width}
        if "width_multiplier" in given:  # which leaves the other no say
            del told["width_per_group"]
    return {name: value for name, value in told.items() if name not in given}


def _has_biases(state_dict: Mapping[str, Any]) -> bool:
    """Whether most convolutions have biases: all of D2L's; of the others' only a wrapper's."""
    convolutions = [key for key, value in state_dict.items() if np.ndim(value) == 4]
    biased = sum(f"{key.removesuffix('weight')}bias" in state_dict for key in convolutions)
    return 2 * biased > len(convolutions)
