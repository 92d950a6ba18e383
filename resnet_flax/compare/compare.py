"""Where a Flax network and a PyTorch network part, layer by layer: our networks and other ports.

Both run whole, where differences grow from layer to layer. Then each Flax layer runs *alone*: it
receives what its PyTorch counterpart received, and what it returns is replaced by what that one
returned, so that a fault of a layer, or between layers, shows at its own place and nowhere else.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import FlaxError

from resnet_flax.compare.diagnosis import Finding, find_causes
from resnet_flax.compare.recording import (
    FlaxNetwork,
    FlaxRun,
    LonelyRun,
    TorchLayer,
    Weights,
    by_layer,
    run_torch,
)
from resnet_flax.errors import InputError, one_line
from resnet_flax.weights.keys import match_keys

# Of a layer alone, relative to its largest value. Rounding leaves 1e-15, 1e-6 and 1e-2; an epsilon
# of 1e-3 instead of 1e-5 moves the output by 5e-4 where the variance is 1.
TOLERANCES = {"float64": 1e-9, "float32": 3e-5, "float16": 5e-3, "bfloat16": 3e-2}
# In a whole network a value near zero may fall on the other side of a ReLU and take its gradient
# with it, so that only gross differences of gradients count.
GRADIENT_FACTOR = 1e4


class Difference(NamedTuple):
    """The largest difference, and its share of PyTorch's largest value.

    Both are infinite where the shapes differ or a value is not a number.
    """

    absolute: float
    relative: float


class Row(NamedTuple):
    """One layer of the table: in the whole network, and alone, given PyTorch's input."""

    layer: str  # its path in the Flax model, such as "layer1/0/conv1"; "" is the whole model
    torch_name: str  # its name in the PyTorch module, such as "layer1.0.conv1"
    output: Difference
    gradient: Difference | None  # by output and weights; None if whole outputs differ in shape
    alone: Difference  # of the output
    statistics: Difference | None  # of the running statistics after the run, alone


@dataclass(frozen=True)
class Comparison:
    """What `compare_with_torch` found; ``print`` it for a table."""

    rows: tuple[Row, ...]  # of each layer that both have, in the order in which Flax finishes them
    findings: tuple[Finding, ...]  # layers that diverge by themselves, in the order of execution
    tolerance: float  # relative difference from which a layer alone counts as diverging

    @property
    def first_diverging_layer(self) -> str | None:
        """The first finding's layer, or None."""
        return self.findings[0].layer if self.findings else None

    @property
    def likely_cause(self) -> str | None:
        """The first finding's cause, or None."""
        return self.findings[0].cause if self.findings else None

    def __str__(self) -> str:
        width = max(12, *(len(row.layer) for row in self.rows))
        lines = [
            f"{'':{width}}  ------- in the whole network --------   -- on PyTorch's input -",
            f"{'':{width}}  ----- output -----   ---- gradient ----     output statistics",
            f"{'layer':{width}}  absolute  relative   absolute  relative   relative   relative",
        ]
        for row in self.rows:
            gradient, statistics = row.gradient or (None, None), row.statistics or (None, None)
            numbers = (*row.output, *gradient, row.alone.relative, statistics[1])
            sizes = (10, 10, 11, 10, 11, 11)
            cells = "".join(f"{_number(n):>{s}}" for n, s in zip(numbers, sizes, strict=True))
            mark = " <--" if row.layer == self.first_diverging_layer else ""
            lines.append(f"{row.layer or 'whole model':{width}}{cells}{mark}".rstrip())
        if not self.findings:
            return "\n".join([*lines, f"No layer diverges by more than {self.tolerance:g}."])
        first, *others = self.findings
        lines.append(f"First diverging layer: {first.layer or 'whole model'}")
        lines.append(f"Likely cause: {first.cause}: {first.detail}")
        if others:
            counts = Counter(finding.cause for finding in others).items()
            lines.append("Further on: " + ", ".join(f"{n} x {cause}" for cause, n in counts))
        return "\n".join(lines)


def compare_with_torch(
    model: nn.Module,
    variables: Mapping[str, Any],
    torch_module: Any,
    images: Any,
    *,
    train: bool = True,
    names: Mapping[str, str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Comparison:
    """Compares a Flax port with its PyTorch original, layer by layer, forward and backward.

    The gradients are those of the output's product with fixed random numbers. ``train=True`` also
    compares the running statistics after the batch; take a small one, since the biased and the
    unbiased variance differ by 1 in n. Neither ``variables`` nor ``torch_module`` is changed.

    Args:
        model: any Linen module.
        variables: its parameters and running statistics, converted from ``torch_module``.
        torch_module: the `torch.nn.Module`, called on the images as (N, C, H, W).
        images: floating point, (N, H, W, C), or whatever both take. Float64 (with JAX's x64, and
            both networks in float64) leaves no doubt; in float32 an epsilon can hide behind a
            large variance.
        train: the mode of both.
        names: Flax path -> PyTorch name, such as ``{"stem/conv": "conv1"}``, where none of the
            `resnet_flax.weights.LAYOUTS` fits. What has no name is compared only through the next
            layer that has one.
        arguments: keyword arguments of the Flax call; by default ``{"train": train}``.
        tolerance: of a layer alone, relative; by default that of the dtype in `TOLERANCES`.

    Raises:
        InputError: when either network does not take the images, no layer has a counterpart, a
            name is not there, or a layer is called twice.
    """
    if not hasattr(torch_module, "named_modules"):
        raise InputError(f"torch_module is a {type(torch_module).__name__}, not a torch.nn.Module")
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be floating point, not {images.dtype}")
    if "params" not in variables:
        raise InputError('variables must be {"params": ..., "batch_stats": ...}')
    arguments = {"train": train} if arguments is None else arguments
    network = FlaxNetwork(model, variables, images, arguments)
    try:
        calls = network.calls()
    except (FlaxError, TypeError, ValueError) as error:
        raise InputError(f"the Flax model fails: {one_line(error)}") from error
    if "" not in dict(calls):
        raise InputError("the Flax model returns something else than one array")
    theirs = run_torch(torch_module, np.asarray(images), train)
    own = by_layer(variables)
    matched = _match([path for path, _ in calls], own, theirs, names or {})
    layers = {path: theirs[name] for path, name in matched.items()}
    whole, alone = network.run_whole(layers, dict(calls)), network.run_alone(layers)

    if tolerance is None:
        tolerance = TOLERANCES[str(whole.outputs[""].dtype)]
    rows = tuple(_row(path, name, theirs[name], whole, alone) for path, name in matched.items())

    def close(found: Any, expected: Any) -> bool:
        return _difference(found, expected).relative <= tolerance

    findings = find_causes(matched, theirs, own, alone, train, close)
    if not findings:
        # The derivative is wrong somewhere behind the last layer whose gradient differs.
        limit = GRADIENT_FACTOR * tolerance
        wrong = [row.layer for row in rows if row.gradient and not row.gradient.relative <= limit]
        findings = [Finding(path, "gradient", "all outputs agree") for path in wrong[-1:]]
    return Comparison(rows, tuple(findings), tolerance)


def _match(
    calls: Sequence[str],
    own: Mapping[str, Weights],
    theirs: Mapping[str, TorchLayer],
    names: Mapping[str, str],
) -> dict[str, str]:
    """Flax path -> PyTorch name, in the order in which Flax finishes its layers."""
    order = Counter(calls)
    unknown = [*(names.keys() - order.keys()), *(set(names.values()) - theirs.keys())]
    if unknown:
        raise InputError(f"names: not called in either network: {', '.join(sorted(unknown))}")
    # As if each layer had a kernel: of those that exist, most decide which layout it is.
    leaves = {path: ("params", *path.split("/"), "kernel") for path in order if path}
    weights = {f"{name}.weight": layer for name, layer in theirs.items() if layer.weights}
    keys = match_keys(leaves.values(), weights)
    default = {path: keys[leaf].removesuffix(".weight") for path, leaf in leaves.items()}
    # What has weights is no counterpart of an Identity that has taken its place.
    empty = {name for name, layer in theirs.items() if not layer.weights}
    default = {path: name for path, name in default.items() if not (path in own and name in empty)}
    matched = {**default, **names, "": ""}
    matched = {path: matched[path] for path in order if matched.get(path) in theirs}
    if not own.keys() & matched.keys():
        raise InputError(
            "no layer with weights has a counterpart; pass names={Flax path: PyTorch name}: Flax "
            f"has {', '.join(own)}; PyTorch has {', '.join(filter(None, theirs))}"
        )
    if twice := [path for path in matched if order[path] > 1]:
        raise InputError(f"called twice in Flax: {', '.join(twice)}")
    return matched


def _row(path: str, name: str, layer: TorchLayer, whole: FlaxRun, alone: LonelyRun) -> Row:
    gradient = statistics = None
    if whole.gradients:
        of_output = _difference(whole.gradients[path], layer.gradient)
        ours = whole.weight_gradients.get(path, {})
        of_weights = _joint_difference(ours, layer.weight_gradients)
        gradient = Difference(*map(max, of_output, of_weights))
    after = alone.weights_after.get(path, {})
    if "mean" in after and "mean" in layer.weights_after:
        parts = [_difference(after[leaf], layer.weights_after[leaf]) for leaf in ("mean", "var")]
        statistics = Difference(*map(max, *parts))
    output, lonely = (_difference(run.outputs[path], layer.output) for run in (whole, alone))
    return Row(path, name, output, gradient, lonely, statistics)


def _difference(found: Any, expected: np.ndarray) -> Difference:
    if np.shape(found) != expected.shape:
        return Difference(np.inf, np.inf)
    absolute = float(np.abs(np.asarray(found, np.float64) - expected).max(initial=0))
    if not np.isfinite(absolute):  # a NaN agrees with nothing
        return Difference(np.inf, np.inf)
    return Difference(absolute, absolute / float(np.abs(expected).max(initial=0) or 1))


def _joint_difference(found: Weights, expected: Weights) -> Difference:
    """Of all leaves together: the gradient of a bias before a BN is 0 but for rounding."""
    both = found.keys() & expected.keys()
    if any(found[leaf].shape != expected[leaf].shape for leaf in both):
        return Difference(np.inf, np.inf)
    ours, theirs = (
        np.concatenate([np.zeros(0), *(np.ravel(weights[leaf]) for leaf in both)])
        for weights in (found, expected)
    )
    return _difference(ours, theirs)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if value else "0"
