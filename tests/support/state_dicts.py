"""Small state dicts, variables, and their comparison."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import unflatten_dict

from resnet_flax import ResNet
from resnet_flax.weights.state_dict import variable_shapes
from tests.support.torch_reference import TorchvisionResNet, randomise_norms

TINY = ResNet((1, 1), num_classes=3, use_bias=False, norm_shortcut=True)
SMALL = ResNet((1,), num_classes=3, use_bias=False, norm_shortcut=True)
SMALL_STATE_DICT = {
    key: value.numpy() for key, value in TorchvisionResNet((1,), 3, 3).state_dict().items()
}


def tiny_state_dict(in_channels: int = 3, num_classes: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return randomise_norms(TorchvisionResNet((1, 1), in_channels, num_classes)).state_dict()


def random_variables(model: ResNet, in_channels: int = 1) -> Any:
    """Variables of random values, statistics included."""
    shapes = unflatten_dict(variable_shapes(model, in_channels))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.array(random.random(s.shape, np.float32)), shapes)


def assert_same(left: Any, right: Any) -> None:
    """Same tree, dtypes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
