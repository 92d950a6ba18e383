"""Weights between PyTorch's state dicts and Flax's variables, without importing PyTorch.

PyTorch's ``num_batches_tracked`` has no counterpart here (it matters only to a BN with
``momentum=None``): `from_torch` leaves it behind, and `to_torch` writes the number it is given.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype

from resnet_flax.errors import InputError, reason
from resnet_flax.nn.layers import Dense
from resnet_flax.weights.keys import (
    HEAD,
    LAYOUTS,
    Leaf,
    averaged,
    common_prefix,
    listed,
    match_keys,
    torch_keys,
)

TO_TORCH = {0: (), 1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (3, 2, 0, 1)}
TO_FLAX = {0: (), 1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (2, 3, 1, 0)}
FLOATS = ("float64", "float32", "float16", "bfloat16")
# What tools leave in a state dict beside the weights: PyTorch itself, and a counter of operations.
NO_WEIGHTS = ("_extra_state", "total_ops", "total_params")

logger = logging.getLogger(__name__)


class Matched(NamedTuple):
    """A state dict beside a network."""

    tensors: dict[str, Any]  # the network's part of it, of values with shape and dtype
    expected: dict[Leaf, jax.ShapeDtypeStruct]  # the network's leaves
    keys: dict[Leaf, str]  # of each of them, and of a dense layer


def match(model: Any, state_dict: Mapping[str, Any], in_channels: int) -> Matched:
    """Finds out which of a state dict's keys are which of a network's leaves.

    Where the network is wrapped, what lies beside it is left behind, and logged; so are its average
    (EMA), and what is known to be no weight.
    """
    if not isinstance(state_dict, Mapping):
        raise InputError(f"a state dict maps keys to tensors; got {type(state_dict).__name__}")
    given = {str(key): value for key, value in state_dict.items()}
    expected = variable_shapes(model, in_channels)
    keys = match_keys(expected, given)
    prefix = common_prefix(keys.values())
    tensors = {k: _with_shape(k, value) for k, value in given.items() if k.startswith(prefix)}
    if strays := [key for key in given if key not in tensors]:
        logger.info("left behind, being outside of %s: %s", listed([prefix]), listed(strays))
    others = [key for key in tensors if _no_weight(key.removeprefix(prefix))]
    if others:
        logger.info("left behind, being no weights, or their average: %s", listed(others))
        tensors = {key: value for key, value in tensors.items() if key not in others}
    return Matched(tensors, expected, keys)


def _no_weight(key: str) -> bool:
    return key.rpartition(".")[2] in NO_WEIGHTS or averaged(key.partition(".")[0])


def from_torch(
    model: Any,
    state_dict: Mapping[str, Any] | Matched,
    *,
    in_channels: int | None = None,
    adapt_stem: Literal["sum", "replicate"] | None = None,
    new_head: jax.Array | int | None = None,
    drop_head: bool = False,
    dtype: Dtype | None = None,
) -> dict[str, Any]:
    """Converts a PyTorch state dict into the variables of a model, which share no memory with it.

    The layout of the keys and a prefix that most share, such as ``module.``, are recognised; the
    log tells of keys without the prefix. Nothing of the network is dropped, drawn or reshaped
    unless asked for, and then it is logged.

    Args:
        model: a `ResNet` of the checkpoint's flavour and classes; or a block or stage of D2L's or
            torchvision's, for which ``in_channels`` must be given.
        state_dict: key -> anything `numpy.asarray` takes, or what `match` made of that.
        in_channels: channels of the images; by default those of the checkpoint.
        adapt_stem: how to get ``in_channels`` from another number. "sum": to one channel, whose
            kernel is the sum of the checkpoint's, as suits grey images. "replicate": the
            checkpoint's channels in turn, scaled so that equal channels keep their output.
        new_head: a seed or random key: leave the dense layer behind and draw a new one.
        drop_head: leave the dense layer behind, for a model with ``num_classes=0``.
        dtype: by default the model's ``param_dtype``; "keep" for the checkpoint's own.

    Raises:
        InputError: when keys are missing, surplus, misshapen or not floating-point (the first of
            each are named), or when an adaptation is impossible.
    """
    if adapt_stem == "sum" and in_channels is None:
        in_channels = 1
    if not isinstance(state_dict, Matched):
        state_dict = match(model, state_dict, in_channels or 1)
    given, expected, keys = dict(state_dict.tensors), state_dict.expected, state_dict.keys
    if new_head is not None or drop_head:
        left = [keys[leaf] for leaf in HEAD if given.pop(keys[leaf], None) is not None]
        logger.info("dense layer: left behind %s", ", ".join(left) or "nothing")
    if new_head is not None:
        # As PyTorch would have it: turned, like every kernel.
        drawn = _draw_head(model, new_head, expected).items()
        given |= {keys[leaf]: np.asarray(value).T for leaf, value in drawn}
        logger.info("dense layer: drawn anew for %d classes", model.num_classes)

    stem = stem_kernel(expected)
    shapes = {
        keys[leaf]: tuple(spec.shape[axis] for axis in TO_TORCH[len(spec.shape)])
        for leaf, spec in expected.items()
    }
    if adapt_stem or in_channels is None:
        # How many channels the checkpoint's images have is for the checkpoint to say.
        channels = _channels(given.get(keys[stem]), axis=1)
        shapes[keys[stem]] = (shapes[keys[stem]][0], channels, *shapes[keys[stem]][2:])
    counters = {_counter(keys[leaf]) for leaf in expected if leaf[-1] == "mean"} & given.keys()
    _check("the state dict", shapes, {k: value for k, value in given.items() if k not in counters})
    if seen := {counted(key, given[key]) for key in counters} - {0}:
        logger.debug("num_batches_tracked: left behind, %s", ", ".join(map(str, sorted(seen))))

    leaves = {}
    for leaf, spec in expected.items():
        array = _as_numpy(keys[leaf], given[keys[leaf]])
        target = array.dtype if dtype == "keep" else np.dtype(dtype or spec.dtype)
        array = array.transpose(TO_FLAX[array.ndim])
        if leaf == stem and adapt_stem:
            array = _adapt_stem(array, adapt_stem, in_channels)
        if jax.dtypes.canonicalize_dtype(target) != target:
            raise InputError(f"{target} needs jax.config.update('jax_enable_x64', True)")
        leaves[leaf] = jnp.array(array.astype(target), copy=True)
    return unflatten_dict(leaves)


def to_torch(
    model: Any,
    variables: Mapping[str, Any],
    layout: str = "torchvision",
    *,
    dtype: Dtype | None = None,
    num_batches_tracked: int = 0,
) -> dict[str, np.ndarray]:
    """Converts the variables of ``model`` into a PyTorch state dict of NumPy arrays.

    The arrays are new, writeable and contiguous, of the variables' dtype by default.
    ``load_state_dict(strict=True)`` takes them after `torch.from_numpy`, which refuses bfloat16:
    carry that over through `save_safetensors`. The layout is a key of `LAYOUTS`; where D2L's has no
    name for a layer, torchvision's is used. ``num_batches_tracked``, the training steps taken so
    far, goes to every BN's counter.

    Raises:
        InputError: when the variables are not the model's, or the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    given = {leaf: _with_shape("/".join(leaf), v) for leaf, v in flatten_dict(variables).items()}
    expected = variable_shapes(model, _channels(given.get(stem_kernel(given)), axis=2))
    shapes = {"/".join(leaf): spec.shape for leaf, spec in expected.items()}
    _check("the variables", shapes, {"/".join(leaf): value for leaf, value in given.items()})

    state_dict = {}
    for leaf, key in torch_keys(expected, layout).items():
        array = np.asarray(given[leaf], dtype)
        state_dict[key] = np.array(array.transpose(TO_TORCH[array.ndim]), order="C")
        if leaf[-1] == "mean":
            state_dict[_counter(key)] = np.array(num_batches_tracked, np.int64)
    return state_dict


def variable_shapes(model: Any, in_channels: int) -> dict[Leaf, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf of the variables, without computing any."""
    images = jax.ShapeDtypeStruct((1, 32, 32, in_channels), jnp.float32)
    return flatten_dict(_init.eval_shape(model, jax.random.key(0), images))


@partial(jax.jit, static_argnums=0)
def _init(model: Any, key: jax.Array, images: jax.Array) -> Any:
    return model.init(key, images)  # JAX remembers the shapes of each model


def stem_kernel(leaves: Iterable[Leaf]) -> Leaf:
    """The first convolution's kernel, whose input channels are those of the images."""
    ends = ("conv1", "kernel"), ("conv1", "0", "kernel")  # of one convolution, of a deep stem
    return min((leaf for leaf in leaves if leaf[-2:] in ends or leaf[-3:] in ends), default=())


def _channels(kernel: Any, axis: int) -> int:
    """Input channels of a kernel; 1 for what is none, which the check of shapes will say."""
    shape = () if kernel is None else tuple(kernel.shape)
    return max(1, shape[axis]) if len(shape) == 4 else 1


def counted(key: str, value: Any) -> int:
    """A ``num_batches_tracked``, which averaging makes a float, and other tools a bool or (1,)."""
    try:
        return int(_as_numpy(key, value).item())
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{key} is no number of steps: {reason(error)}") from error


def _counter(running_mean: str) -> str:
    return running_mean.removesuffix("running_mean") + "num_batches_tracked"


def _with_shape(key: str, value: Any) -> Any:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key!r} is not an array: {error}") from error


def _dtype_name(value: Any) -> str:
    return getattr(value.dtype, "name", str(value.dtype)).removeprefix("torch.")


def _check(what: str, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> None:
    """Tells of every fault of names, shapes and dtypes, before memory is taken."""
    both = sorted(shapes.keys() & given.keys())
    found = {key: tuple(given[key].shape) for key in both}
    dtypes = {key: _dtype_name(given[key]) for key in both}
    faults = {
        "missing": sorted(shapes.keys() - given.keys()),
        "surplus": sorted(given.keys() - shapes.keys()),
        "wrong shape": [f"{k} {found[k]}, not {shapes[k]}" for k in both if found[k] != shapes[k]],
        "wrong dtype": [f"{k} {dtypes[k]}" for k in both if dtypes[k] not in FLOATS],
    }
    if told := [f"{fault}: {listed(keys)}" for fault, keys in faults.items() if keys]:
        raise InputError(f"{what} and the model do not fit: {'; '.join(told)}")


def _as_numpy(key: str, value: Any) -> np.ndarray:
    """A NumPy array of a NumPy, JAX or PyTorch one; the memory may be shared."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if _dtype_name(value) == "bfloat16":
                # NumPy gets no bfloat16 from PyTorch, but float32 holds each of them exactly.
                return value.float().numpy().astype(ml_dtypes.bfloat16)
        return np.asarray(value)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(f"{key} has no values to read: {error}") from error


def _adapt_stem(kernel: np.ndarray, how: str, in_channels: int | None) -> np.ndarray:
    """Turns a kernel (H, W, I, O) into (H, W, in_channels, O)."""
    given = kernel.shape[2]
    if how == "sum" and in_channels == 1:
        logger.info("stem: %d input channels summed into one", given)
        return kernel.sum(2, keepdims=True, dtype=np.float64)
    if how == "replicate" and in_channels:
        logger.info(
            f"stem: {given} input channels replicated to {in_channels}, scaled by their ratio"
        )
        return kernel[:, :, np.arange(in_channels) % given].astype(np.float64) * given / in_channels
    raise InputError('adapt_stem is "sum", for one channel, or "replicate", for in_channels=N')


def _draw_head(model: Any, key: Any, expected: Mapping[Leaf, Any]) -> dict[Leaf, jax.Array]:
    if HEAD[0] not in expected:
        raise InputError("new_head needs a model with num_classes > 0")
    inputs = jnp.zeros((1, expected[HEAD[0]].shape[0]))
    key = jax.random.key(key) if isinstance(key, int) else key
    layer = Dense(model.num_classes, model.dense_init, param_dtype=model.param_dtype)
    params = layer.init(key, inputs)["params"]
    return {leaf: params[leaf[-1]] for leaf in HEAD}
