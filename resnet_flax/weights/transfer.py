"""Fine-tuning: a start from other weights, and parts of the network that stay as they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import optax

from resnet_flax.errors import InputError, one_line
from resnet_flax.nn.resnet import ResNet
from resnet_flax.weights.keys import HEAD, match_keys
from resnet_flax.weights.state_dict import from_torch, load_safetensors, variable_shapes

STEM = ("params", "conv1", "kernel")


def start_from(
    path: Path, model: ResNet, *, channels: int, seed: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Reads the variables that a training starts from, fitted to the network.

    A dense layer for another number of classes is drawn anew. A stem for another number of channels
    is summed (to one) or replicated, see `resnet_flax.weights.state_dict.from_torch`.

    Args:
        path: a safetensors file in any of `resnet_flax.weights.keys.LAYOUTS`.
        model: to be trained.
        channels: of its images.
        seed: for the dense layer.
        report: called with a line for each thing adapted.

    Returns:
        What `resnet_flax.training.step.create_train_state` takes.

    Raises:
        InputError: when the file cannot be read, or is of another network.
    """
    state_dict = load_safetensors(path)
    keys = match_keys(variable_shapes(model, channels), state_dict)
    stem, head = (state_dict.get(keys[leaf]) for leaf in (STEM, HEAD[1]))
    classes = None if head is None else head.shape[:1]
    adapted: Literal["sum", "replicate"] | None = None
    if stem is not None and stem.ndim == 4 and stem.shape[1] != channels:
        adapted = "sum" if channels == 1 else "replicate"
    biased = keys[STEM].removesuffix("weight") + "bias" in state_dict
    if stem is not None and biased != model.use_bias:
        raise InputError(
            f"--init {path} is of another flavour: its convolutions have "
            f"{'biases' if biased else 'no biases'}; choose --flavour and --recipe to fit"
        )
    try:
        return from_torch(
            model,
            state_dict,
            in_channels=channels,
            adapt_stem=adapted,
            new_head=seed if classes != (model.num_classes,) else None,
            report=lambda line: report(f"{path}: {line}"),
        )
    except InputError as error:
        raise InputError(f"--init {path}: {one_line(error)[:1000]}") from error


def freeze(optimizer: optax.GradientTransformation, model: ResNet) -> optax.GradientTransformation:
    """Keeps the parameters of the model's ``frozen_stages`` as they are, to the bit.

    The compiler leaves out the gradients that nothing needs, so that a frozen part costs its
    forward pass only.

    Args:
        optimizer: for the other parameters.
        model: in which the frozen parts stay in eval mode.

    Raises:
        InputError: when there are not as many parts.
    """
    if not model.frozen_stages:
        return optimizer
    stages = [f"layer{index + 1}" for index in range(len(model.stage_sizes))]
    if model.frozen_stages > 1 + len(stages):
        raise InputError(
            f"--freeze-stages must be at most {1 + len(stages)}, the stem and {len(stages)} "
            f"stages, not {model.frozen_stages}"
        )
    frozen = {"conv1", "bn1", *stages[: model.frozen_stages - 1]}
    return optax.multi_transform(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: {name: "frozen" if name in frozen else "trained" for name in params},
    )
