"""Which layers of a Flax network diverge by themselves from PyTorch's, and why."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from resnet_flax.compare.hypotheses import (
    Cause,
    Close,
    explain_between,
    explain_output,
    explain_statistics,
)
from resnet_flax.compare.recording import LonelyRun, TorchLayer, Weights


class Finding(NamedTuple):
    """A layer that diverges by itself.

    Attributes:
        layer: its path in Flax; or its PyTorch name, where Flax lacks it.
        cause: the likely cause: "padding", "BN momentum", "eps", "biased variance", "stride
            placement v1/v1.5", "transposed kernel", "missing shortcut norm", "missing layer",
            "surplus layer", "strides", "bias", "weights", "train mode", "unbiased variance",
            "activation", "between layers", "shape", "gradient" or "unknown".
        detail: what was seen.
    """

    layer: str
    cause: str
    detail: str


def find_causes(
    matched: Mapping[str, str],
    theirs: Mapping[str, TorchLayer],
    own: Mapping[str, Weights],
    alone: LonelyRun,
    train: bool,
    close: Close,
) -> list[Finding]:
    """Explains what diverges, in the order of execution.

    Args:
        matched: Flax path -> PyTorch name.
        theirs: PyTorch's layers.
        own: the weights of Flax's layers before the run.
        alone: what Flax's layers did with PyTorch's inputs.
        train: the mode of the run.
        close: whether Flax's values agree with others.
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
                found.append((path, explain_between(given, layer.input, theirs.values(), close)))
            continue
        output = np.asarray(alone.outputs[path], np.float64)
        if not close(output, layer.output):
            found.append((path, explain_output(layer, output, weights, train, close)))
        after = alone.weights_after.get(path, {})
        if "mean" in after and "mean" in layer.weights:
            causes = explain_statistics(layer, weights, after, close)
            found += [(path, cause) for cause in causes]
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
            missing.setdefault(last, []).append((name, _missing_cause(name, theirs, last)))
    return missing


def _missing_cause(name: str, theirs: Mapping[str, TorchLayer], before: str) -> Cause:
    layer = theirs[name]
    if before and "mean" in layer.weights and np.array_equal(layer.input, theirs[before].output):
        # The last of several convolutions of the same input is the shortcut's.
        sharing = [
            other
            for other, layer in theirs.items()
            if "kernel" in layer.weights and np.array_equal(layer.input, theirs[before].input)
        ]
        if len(sharing) > 1 and sharing[-1] == before:
            return Cause("missing shortcut norm", f"Flax has none after PyTorch's {before}")
    return Cause("missing layer", "Flax has no counterpart")


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
