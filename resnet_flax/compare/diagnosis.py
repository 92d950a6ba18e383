"""Which layers of a Flax network diverge by themselves from PyTorch's, and why.

Each hypothesis repeats PyTorch's arithmetic on PyTorch's own input with one thing changed; the
cause is the change that gives Flax's output. All arrays are NHWC and float64.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from resnet_flax.compare.recording import LonelyRun, TorchLayer, Weights

Close = Callable[[Any, Any], bool]
PADDINGS: tuple[str | int, ...] = ("SAME", "VALID", 0, 1, 2, 3)
STRIDES = (1, 2, 3, 4)


class Finding(NamedTuple):
    """A layer that diverges by itself.

    The likely causes are "padding", "BN momentum", "eps", "biased variance", "stride placement
    v1/v1.5", "transposed kernel", "missing shortcut norm", "missing layer", "surplus layer",
    "strides", "bias", "weights", "train mode", "unbiased variance", "activation", "between layers",
    "shape", "gradient" and "unknown".
    """

    layer: str  # its path in Flax; or its PyTorch name, where Flax lacks it
    cause: str
    detail: str  # what was seen


class Cause(NamedTuple):
    """As in a `Finding`; and Flax's step over PyTorch's, where the cause is the strides."""

    name: str
    detail: str
    stride_ratio: float = 1.0


def find_causes(
    matched: Mapping[str, str],
    theirs: Mapping[str, TorchLayer],
    own: Mapping[str, Weights],
    alone: LonelyRun,
    train: bool,
    close: Close,
) -> list[Finding]:
    """Explains what diverges, in the order of execution.

    ``matched`` is Flax path -> PyTorch name; ``own`` are Flax's weights before the run.
    """
    missing = _missing(theirs, set(matched.values()))
    found = missing.pop("", [])
    for path, event in alone.events:
        if path not in matched:
            if path in own:
                found.append((path, Cause("surplus layer", "PyTorch has no counterpart")))
            continue
        layer, weights = theirs[matched[path]], own.get(path, {})
        if event == "input":
            given = np.asarray(alone.inputs[path], np.float64)
            if not close(given, layer.input):
                found.append((path, _explain_between(given, layer.input, theirs.values(), close)))
            continue
        output = np.asarray(alone.outputs[path], np.float64)
        if not close(output, layer.output):
            found.append((path, _explain_output(layer, output, weights, train, close)))
        after = alone.weights_after.get(path, {})
        if "mean" in after and "mean" in layer.weights:
            found += [(path, why) for why in _explain_statistics(layer, weights, after, close)]
        found += missing.pop(matched[path], [])
    return _with_stride_placement(found)


def _missing(
    theirs: Mapping[str, TorchLayer], matched: Iterable[str]
) -> dict[str, list[tuple[str, Cause]]]:
    """PyTorch's layers with weights that Flax lacks, by the matched layer before; "" is none."""
    missing: dict[str, list[tuple[str, Cause]]] = {}
    last = ""
    for name, layer in theirs.items():
        if layer.weights and name in matched:
            last = name
        elif layer.weights:
            cause = Cause("missing layer", "Flax has no counterpart")
            if last and "mean" in layer.weights:
                given, made = theirs[last].input, theirs[last].output
                convs = [n for n, o in theirs.items() if "kernel" in o.weights]
                sharing = [n for n in convs if np.array_equal(theirs[n].input, given)]
                # The last of several convolutions of the same input is the shortcut's.
                is_shortcut = len(sharing) > 1 and sharing[-1] == last
                if is_shortcut and np.array_equal(layer.input, made):
                    cause = Cause("missing shortcut norm", f"Flax has none after PyTorch's {last}")
            missing.setdefault(last, []).append((name, cause))
    return missing


def _with_stride_placement(found: Sequence[tuple[str, Cause]]) -> list[Finding]:
    """Renames the strides of layers of one block whose product is that of PyTorch's."""
    blocks: dict[str, dict[str, float]] = {}
    for path, cause in found:
        if cause.name == "strides":
            blocks.setdefault(path.rpartition("/")[0], {})[path] = cause.stride_ratio
    findings = []
    for path, (name, detail, _) in found:
        block = blocks.get(path.rpartition("/")[0], {})
        if name == "strides" and len(block) > 1 and np.prod([*block.values()]) == 1:
            name = "stride placement v1/v1.5"
            ours, others = max(block, key=block.__getitem__), min(block, key=block.__getitem__)
            detail = f"Flax takes the step in {ours}, PyTorch in {others}"
        findings.append(Finding(path, name, detail))
    return findings


def _explain_output(
    layer: TorchLayer, found: np.ndarray, weights: Weights, train: bool, close: Close
) -> Cause:
    shape = Cause("shape", f"{found.shape} instead of {layer.output.shape}")
    if found.ndim != layer.output.ndim or found.shape[-1] != layer.output.shape[-1]:
        return shape
    cause = None
    if "kernel" in layer.weights and layer.input.ndim == 4:
        cause = _explain_convolution(layer, found, weights, close)
    elif "kernel" in layer.weights and layer.input.ndim == 2:
        cause = _explain_dense(layer, found, close)
    elif "mean" in layer.weights:
        cause = _explain_norm(layer, found, train, close)
    if cause:
        return cause
    both = layer.weights.keys() & weights.keys()
    if wrong := sorted(leaf for leaf in both if not close(weights[leaf], layer.weights[leaf])):
        return Cause("weights", f"other values before the run: {', '.join(wrong)}")
    if found.shape != layer.output.shape:
        return shape
    if not layer.weights:
        return _explain_between(found, layer.output, (), close)
    return Cause("unknown", "the weights agree, but the outputs do not")


def _explain_statistics(
    layer: TorchLayer, before: Weights, after: Weights, close: Close
) -> list[Cause]:
    """Why running statistics went from ``before`` to ``after``; nothing where they agree."""
    if all(close(after[leaf], layer.weights_after[leaf]) for leaf in ("mean", "var")):
        return []
    if not all(close(before[leaf], layer.weights[leaf]) for leaf in ("mean", "var")):
        return [Cause("weights", "the running statistics differ before the run")]
    mean, var, count = _moments(layer.input)
    way = mean - before["mean"]
    rate = float((after["mean"] - before["mean"]) @ way / (way @ way)) if way.any() else 0.0
    momentum = layer.module.momentum

    def moved(leaf: str, target: np.ndarray, share: float) -> bool:
        return close(after[leaf], before[leaf] + share * (target - before[leaf]))

    causes = []
    if momentum is None or not moved("mean", mean, momentum):
        theirs = "the mean over all batches" if momentum is None else f"{momentum:.2g}"
        ours = f"{rate:.2g} in Flax (momentum={1 - rate:.2g} of nn.BatchNorm)"
        causes.append(Cause("BN momentum", f"a new batch weighs {ours}, in PyTorch {theirs}"))
    if not moved("var", var * count / max(1, count - 1), rate) and moved("var", var, rate):
        detail = "the running variance takes n, in PyTorch n - 1, in its mean"
        causes.append(Cause("biased variance", detail))
    return causes or [Cause("unknown", "the running statistics are updated in another way")]


def _explain_between(
    found: np.ndarray, expected: np.ndarray, layers: Iterable[TorchLayer], close: Close
) -> Cause:
    """Why values made of PyTorch's outputs by pooling, adding or activating differ."""
    for layer in layers:  # only max pooling has this attribute
        if hasattr(layer.module, "return_indices") and np.array_equal(layer.output, expected):
            window, strides = _pair(layer.module.kernel_size), _pair(layer.module.stride)
            for padding in PADDINGS:
                edges = _edges(padding)
                if close(found, nn.max_pool(jnp.asarray(layer.input), window, strides, edges)):
                    theirs = layer.module.padding
                    return Cause("padding", f"max pooling with {padding!r} instead of {theirs}")
    if found.shape != expected.shape:
        return Cause("shape", f"{found.shape} instead of {expected.shape}")
    if close(np.maximum(found, 0), expected):
        return Cause("activation", "equal if a ReLU followed")
    if close(found, np.maximum(expected, 0)):
        return Cause("activation", "equal if the ReLU were left out")
    return Cause("between layers", "they agree; a ReLU, addition or pooling among them does not")


def _explain_convolution(
    layer: TorchLayer, found: np.ndarray, weights: Weights, close: Close
) -> Cause | None:
    conv, kernel = layer.module, layer.weights["kernel"]
    bias = layer.weights.get("bias", np.zeros(1))
    turned = {
        "height and width swapped": kernel.swapaxes(0, 1),
        "rotated by 180 degrees": kernel[::-1, ::-1],
        "input and output channels swapped": kernel.swapaxes(2, 3),
    }
    guesses: list[tuple[str, str, dict[str, Any]]] = [
        ("transposed kernel", f"equal if it were {how}", {"kernel": value})
        for how, value in turned.items()
        if value.shape == kernel.shape
    ]
    settings = {"kernel": kernel, "bias": bias, "strides": conv.stride, "padding": conv.padding}
    changes: list[tuple[str, Any]] = [("padding", padding) for padding in PADDINGS]
    changes += [("strides", (stride, stride)) for stride in STRIDES]
    for name, value in changes:
        detail = f"{value!r} in Flax, {settings[name]} in PyTorch"
        guesses.append((name, detail, {name: value}))
    guesses.append(("bias", "Flax adds none, or zeros", {"bias": np.zeros(1)}))
    if "bias" in weights:
        guesses.append(("bias", "PyTorch has another, or none", {"bias": weights["bias"]}))
    for name, detail, change in guesses:
        guess = {**settings, **change}
        output = guess["bias"] + lax.conv_general_dilated(
            jnp.asarray(layer.input),
            jnp.asarray(guess["kernel"]),
            guess["strides"],
            _edges(guess["padding"]),
            rhs_dilation=conv.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=conv.groups,
        )
        if close(found, output):
            return Cause(name, detail, guess["strides"][0] / conv.stride[0])
    return None


def _explain_dense(layer: TorchLayer, found: np.ndarray, close: Close) -> Cause | None:
    kernel, bias = layer.weights["kernel"], layer.weights.get("bias", np.zeros(1))
    if kernel.shape == kernel.T.shape and close(found, layer.input @ kernel.T + bias):
        return Cause("transposed kernel", "equal if inputs and outputs were swapped")
    if close(found, layer.input @ kernel):
        return Cause("bias", "Flax adds none, or zeros")
    return None


def _explain_norm(layer: TorchLayer, found: np.ndarray, train: bool, close: Close) -> Cause | None:
    x, theirs = layer.input, layer.module.eps
    mean, var, count = _moments(x)
    batch, running = (mean, var), (layer.weights["mean"], layer.weights["var"])
    used, other = (batch, running) if train else (running, batch)
    scale = layer.weights.get("scale", np.ones_like(mean))
    bias = layer.weights.get("bias", np.zeros_like(mean))

    def normalise(moments: tuple[Any, Any], epsilon: float) -> Any:
        return (x - moments[0]) / np.sqrt(moments[1] + epsilon) * scale + bias

    if close(found, normalise(other, theirs)):
        which = "running statistics" if train else "batch's statistics"
        return Cause("train mode", f"Flax normalises by the {which} though train={train}")
    if train and close(found, normalise((mean, var * count / max(1, count - 1)), theirs)):
        return Cause("unbiased variance", "PyTorch normalises by the biased one (n, not n - 1)")
    # The slope of a channel's output over its input, scale / sqrt(var + epsilon), tells epsilon.
    slope = ((x - mean) * found).mean(tuple(range(x.ndim - 1)))
    seen = (slope != 0) & (scale != 0)
    if seen.any():
        sums = scale[seen] * var[seen] / slope[seen]
        epsilon = max(0.0, float(np.median(sums**2 - used[1][seen])))
        if close(found, normalise(used, epsilon)):
            return Cause("eps", f"{epsilon:.2g} in Flax, {theirs:.2g} in PyTorch")
    return None


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and biased variance of (..., C) over all axes but the last, and of how many values."""
    axes = tuple(range(x.ndim - 1))
    return x.mean(axes), x.var(axes), x.size // x.shape[-1]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _edges(padding: Any) -> Any:
    """PyTorch's padding in JAX's words."""
    if isinstance(padding, str):
        return padding.upper()
    return [(pixels, pixels) for pixels in _pair(padding)]
