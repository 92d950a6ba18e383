"""Runs a PyTorch and a Flax network, and records what each layer receives, returns and learns.

PyTorch's recordings are in NHWC and float64, weights in Flax's order of axes under Flax's names.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from resnet_flax.errors import InputError, one_line
from resnet_flax.weights.state_dict import TO_FLAX

Weights = dict[str, Any]  # of one layer: kernel, scale, bias, mean, var
# (path, the layer's own call, its input) -> its output
Around = Callable[[str, Callable[[Any], Any], Any], Any]


class TorchLayer(NamedTuple):
    """What one PyTorch module was, received and did."""

    module: Any  # tells its settings (stride, padding, eps, ...)
    input: np.ndarray
    output: np.ndarray
    gradient: np.ndarray  # with respect to the output
    weights: Weights  # its own, before the run
    weights_after: Weights  # the run updates the statistics
    weight_gradients: Weights


def run_torch(torch_module: Any, images: np.ndarray, train: bool) -> dict[str, TorchLayer]:
    """Records every submodule, in the order in which they finish; the last is "", the whole.

    The gradients are those of the output's product with fixed random numbers.
    """
    net = copy.deepcopy(torch_module).train(train).requires_grad_(True)
    parts, before = dict(net.named_modules()), dict(torch_module.named_modules())
    inputs: dict[str, np.ndarray] = {}
    outputs: dict[str, Any] = {}

    def enter(name: str, args: Any) -> None:
        if name in inputs and any(True for _ in parts[name].parameters()):
            raise InputError(f"the PyTorch layer {name} is called twice")
        if args and _is_tensor(args[0]):  # at once, before an operation in place overwrites it
            inputs[name] = _image(args[0])

    def leave(name: str, output: Any) -> Any:
        output = getattr(output, "logits", output)  # of transformers' networks
        if name not in inputs or not _is_tensor(output):
            return None
        output.retain_grad()
        outputs[name] = output
        return output.clone()  # for an operation in place to overwrite

    for name, part in parts.items():
        part.register_forward_pre_hook(lambda _, args, name=name: enter(name, args))
        part.register_forward_hook(lambda _, args, output, name=name: leave(name, output))
    parameter = next(net.parameters(), None)
    if parameter is None:
        raise InputError("the PyTorch module has no parameters")
    nchw = images.astype(np.float64).transpose((0, 3, 1, 2) if images.ndim == 4 else None)
    with _without_onednn():
        try:
            output = net(parameter.new_tensor(nchw).requires_grad_())
        except InputError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            message = f"the PyTorch module fails on the images: {one_line(error)}"
            raise InputError(message) from error
        if "" not in outputs:
            raise InputError(f"the PyTorch module returns a {type(output).__name__}, not a tensor")
        cotangent = np.random.default_rng(0).standard_normal(output.shape)
        (output * output.new_tensor(cotangent)).sum().backward()
    return {
        name: TorchLayer(
            module=before[name],
            input=inputs[name],
            output=_image(output),
            gradient=_image(_gradient(output)),
            weights=_weights(before[name]),
            weights_after=_weights(parts[name]),
            weight_gradients=_weights(parts[name], _gradient),
        )
        for name, output in outputs.items()
    }


@contextmanager
def _without_onednn() -> Iterator[None]:
    # oneDNN of PyTorch 2.13.0 writes beyond its memory on AVX2 processors: the gradients of a 1x1
    # convolution of stride 2 on transposed images end the process. PyTorch's own context manager,
    # mkldnn.flags, warns of Intel's GPUs.
    onednn = sys.modules["torch"].backends.mkldnn
    before, onednn.enabled = onednn.enabled, False
    try:
        yield
    finally:
        onednn.enabled = before


class FlaxRun(NamedTuple):
    """What a Flax network's layers did, by path."""

    outputs: dict[str, jax.Array]
    # With respect to the outputs; none where the network's has not the shape of PyTorch's.
    gradients: dict[str, jax.Array]
    weight_gradients: dict[str, Weights]


class LonelyRun(NamedTuple):
    """What Flax's layers did with PyTorch's inputs, by path."""

    inputs: dict[str, jax.Array]  # what Flax would have given them, made of PyTorch's outputs
    outputs: dict[str, jax.Array]
    weights_after: dict[str, Weights]
    events: list[tuple[str, str]]  # (path, "input" or "output") in the order of execution


@dataclass
class FlaxNetwork:
    """A Linen module with its variables, images and other arguments."""

    model: nn.Module
    variables: Mapping[str, Any]
    images: jax.Array
    arguments: Mapping[str, Any]

    def apply(self, params: Any, around: Around) -> tuple[Any, Any]:
        """Calls the model; ``around`` does each submodule's call, and may change it."""
        running: set[str] = set()

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = "/".join(context.module.path)
            # A subclass may call super().__call__, which is part of its own call.
            if context.method_name != "__call__" or not args or path in running:
                return call(*args, **kwargs)
            running.add(path)
            try:
                return around(path, lambda x: call(x, *args[1:], **kwargs), args[0])
            finally:
                running.remove(path)

        variables = {**self.variables, "params": params}
        state = [collection for collection in variables if collection != "params"]
        with nn.intercept_methods(intercept):
            return self.model.apply(variables, self.images, mutable=state, **self.arguments)

    def calls(self) -> list[tuple[str, jax.ShapeDtypeStruct]]:
        """Path and output of every call, in the order in which they finish; computes nothing."""
        calls = []

        def note(path: str, call: Any, x: Any) -> Any:
            y = call(x)
            if isinstance(y, jax.Array):
                calls.append((path, jax.ShapeDtypeStruct(y.shape, y.dtype)))
            return y

        jax.eval_shape(lambda params: self.apply(params, note), self.variables["params"])
        return calls

    def run_whole(self, layers: Mapping[str, TorchLayer], shapes: Mapping[str, Any]) -> FlaxRun:
        """Runs forward, and backward from PyTorch's gradient of the output; all by Flax's paths."""

        def forward(params: Any, zeros: Any) -> tuple[Any, Any]:
            outputs = {}

            def note(path: str, call: Any, x: Any) -> Any:
                if path not in layers:
                    return call(x)
                # The gradient of a zero that is added to an output is the output's.
                outputs[path] = call(x) + zeros[path]
                return outputs[path]

            return self.apply(params, note)[0], outputs

        zeros = {path: jnp.zeros_like(shapes[path]) for path in layers}
        output, pull, outputs = jax.vjp(forward, self.variables["params"], zeros, has_aux=True)
        if output.shape != layers[""].output.shape:
            return FlaxRun(outputs, {}, {})
        weight_gradients, gradients = pull(jnp.asarray(layers[""].gradient, output.dtype))
        return FlaxRun(outputs, gradients, by_layer({"params": weight_gradients}))

    def run_alone(self, layers: Mapping[str, TorchLayer]) -> LonelyRun:
        """Runs each layer on PyTorch's input; where channels differ, it keeps its own."""
        run = LonelyRun({}, {}, {}, [])

        def isolate(path: str, call: Any, x: Any) -> Any:
            if known := layers.get(path):
                run.inputs[path] = x
                run.events.append((path, "input"))
                x = _replaced(x, known.input)
            run.outputs[path] = y = call(x)
            run.events.append((path, "output"))
            return _replaced(y, known.output) if known else y

        _, state = self.apply(self.variables["params"], isolate)
        return run._replace(weights_after=by_layer(state))


def by_layer(variables: Mapping[str, Any]) -> dict[str, Weights]:
    """Path -> a layer's own leaves in float64, whatever collections they are in."""
    layers: dict[str, Weights] = {}
    for (_, *path, leaf), value in flatten_dict(variables).items():
        layers.setdefault("/".join(path), {})[leaf] = np.asarray(value, np.float64)
    return layers


def _replaced(ours: jax.Array, theirs: np.ndarray) -> jax.Array:
    """PyTorch's values, of whatever height and width, where the channels fit."""
    fits = ours.ndim == theirs.ndim and ours.shape[-1] == theirs.shape[-1]
    return jnp.asarray(theirs, ours.dtype) if fits else ours


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "retain_grad")


def _gradient(tensor: Any) -> Any:
    """What the scalar does not depend on has gradient 0."""
    return tensor.new_zeros(tensor.shape) if tensor.grad is None else tensor.grad


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().copy()


def _image(tensor: Any) -> np.ndarray:
    array = _array(tensor)
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _weights(module: Any, of: Callable[[Any], Any] = lambda tensor: tensor) -> Weights:
    weights = {}
    leaves = {"weight": "kernel", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    for name, leaf in leaves.items():
        tensor = getattr(module, name, None)
        if _is_tensor(tensor):
            array = _array(of(tensor))
            is_scale = leaf == "kernel" and array.ndim == 1
            weights["scale" if is_scale else leaf] = array.transpose(TO_FLAX[array.ndim])
    return weights
