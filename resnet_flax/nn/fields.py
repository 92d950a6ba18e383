"""Fields of modules: of the right kind and hashable, from the moment a module is made."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype

from resnet_flax.errors import InputError


class Module(nn.Module):
    """A module whose fields may be given as lists, NumPy's numbers and the names of dtypes.

    They become tuples, Python's numbers and dtypes, so that the module hashes, and equals the one
    that was made without them.

    Raises:
        InputError: when a field is of another kind than its annotation says.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("parent", "name"):
                given = getattr(self, field.name)
                value = _plain(given, field.type)
                require(_is_of_kind(value, field.type), field.name, given)
                setattr(self, field.name, value)
        super().__post_init__()


def require(fine: bool, name: str, value: Any) -> None:
    """Makes sure that a field's value is one that it may have.

    Raises:
        InputError: when it is not.
    """
    if not fine:
        raise InputError(f"{name} cannot be {value!r:.100}")


def _plain(value: Any, kind: Any) -> Any:
    if isinstance(value, jax.core.Tracer):  # of a module made within a program
        return value
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = value.tolist()
    if kind == Dtype:
        try:
            return value if value is None else jnp.dtype(value)
        except TypeError:
            return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(item, None) for item in value)
    return value


def _is_of_kind(value: Any, kind: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return kind is float
    if kind == Dtype:
        return value is not None and jnp.issubdtype(value, jnp.floating)
    if kind is int or kind is float:
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if isinstance(kind, type) and get_origin(kind) is None:
        return isinstance(value, kind)
    if get_origin(kind) in (Sequence, tuple):
        item = get_args(kind)[0]
        return isinstance(value, tuple) and all(_is_of_kind(each, item) for each in value)
    return callable(value) and _hashes(value)


def _hashes(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
