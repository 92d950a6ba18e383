"""Derivatives of one's own in both directions: right forwards, and quick backwards.

A `jax.custom_vjp` has no tangents. An operation here is a `jax.custom_jvp` whose tangent is a
`linear` function of its arguments' tangents, with the formulation of the transpose that is quick.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = Sequence[jax.Array]
Linear = Callable[[Arrays, Arrays], jax.Array]
Transpose = Callable[[Arrays, jax.Array], Arrays]


def linear(
    function: Linear, transpose: Transpose, residuals: Arrays, tangents: Arrays
) -> jax.Array:
    """Calls ``function(residuals, tangents)``, which is linear in the tangents.

    Args:
        function: plain JAX, so that it can be differentiated once more.
        transpose: ``transpose(residuals, gradient)``, gradients of the shapes of ``tangents``.
        residuals: what else the two need.
        tangents: what the function is linear in.
    """
    how = {"function": function, "transpose": transpose, "count": len(residuals)}
    return _linear.bind(*residuals, *tangents, **how)


def vary_alike(*arrays: jax.Array) -> Arrays:
    """Casts all to vary over the axes of a `jax.shard_map` over which one does.

    JAX's own operations do it too: the transpose of the cast is the sum over the axes.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    together = frozenset().union(*axes)
    return [
        lax.pcast(array, tuple(together - own), to="varying")
        for array, own in zip(arrays, axes, strict=True)
    ]


_linear = Primitive("linear")


def _call(*args: Any, function: Linear, transpose: Transpose, count: int) -> jax.Array:
    return function(args[:count], args[count:])


def _type(*avals: Any, **how: Any) -> Any:
    (aval,) = jax.make_jaxpr(partial(_call, **how))(*avals).out_avals
    return aval


def _differentiate(args: Any, tangents: Any, **how: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(partial(_call, **how), args, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(
    gradient: Any, *args: Any, function: Linear, transpose: Transpose, count: int
) -> list[Any]:
    tangents = args[count:]
    if type(gradient) is ad.Zero:
        return [None] * len(args)
    wanted = zip(tangents, transpose(args[:count], gradient), strict=True)
    found = [value if ad.is_undefined_primal(tangent) else None for tangent, value in wanted]
    return [None] * count + found


def _batch(
    args: Any, axes: Any, *, function: Linear, transpose: Transpose, count: int
) -> tuple[jax.Array, int]:
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    tangents = [
        batching.bdim_at_front(tangent, axis, size)
        for tangent, axis in zip(args[count:], axes[count:], strict=True)
    ]
    over = partial(jax.vmap, in_axes=(tuple(axes[:count]), 0))
    return linear(over(function), over(transpose), args[:count], tangents), 0


_linear.def_impl(_call)
_linear.def_abstract_eval(_type)
ad.primitive_jvps[_linear] = _differentiate
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_call, multiple_results=False))
