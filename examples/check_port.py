"""Holds a small residual network in plain Flax against its PyTorch original, and names its fault.

``python examples/check_port.py`` prints where the two part, layer by layer, and why. ``--fault``
chooses what is wrong with the port. ``--train`` compares in training, the running statistics
included, where even the port without a fault has one: Flax's running variance is biased. It needs
PyTorch, and takes seconds.
"""

import argparse
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from resnet_flax import configure_runtime
from resnet_flax.commands.command_line import run_command
from resnet_flax.compare import Comparison, compare_with_torch

FAULTS: dict[str, dict[str, Any]] = {
    "padding": {"padding": "SAME"},  # pads one side at stride 2
    "momentum": {"momentum": 0.99},  # Flax's default; PyTorch's 0.1 is 0.9; shows in training
    "epsilon": {"epsilon": 1e-3},  # Keras' default
    "relu": {"relu_first": True},  # the last ReLU before the sum
    "none": {},
}


class TorchBlock(torch.nn.Module):
    """The original: a residual block that halves height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = torch.nn.BatchNorm2d(outputs)
        self.shortcut = torch.nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / 2, W / 2)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class FlaxBlock(nn.Module):
    """The port, from Flax's own layers."""

    outputs: int
    padding: Any = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    relu_first: bool = False

    @nn.compact
    def __call__(self, x: jnp.ndarray, train: bool = False) -> jnp.ndarray:
        """Maps (N, H, W, C) to (N, H / 2, W / 2, outputs)."""

        def norm(name: str) -> nn.Module:
            return nn.BatchNorm(not train, momentum=self.momentum, epsilon=self.epsilon, name=name)

        y = nn.Conv(self.outputs, (3, 3), 2, padding=self.padding, name="conv_a")(x)
        y = nn.relu(norm("norm_a")(y))
        y = norm("norm_b")(nn.Conv(self.outputs, (3, 3), padding=1, name="conv_b")(y))
        shortcut = nn.Conv(self.outputs, (1, 1), 2, padding=0, name="skip")(x)
        return nn.relu(y) + shortcut if self.relu_first else nn.relu(y + shortcut)


class FlaxNetwork(nn.Module):
    """Two blocks and a dense layer."""

    fault: str = "none"

    @nn.compact
    def __call__(self, x: jnp.ndarray, train: bool = False) -> jnp.ndarray:
        """Maps images (N, H, W, 3) to logits (N, 10)."""
        for index, outputs in enumerate((8, 16)):
            x = FlaxBlock(outputs, **FAULTS[self.fault], name=f"block_{index}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


# The port's layer -> the original's.
BLOCK = {
    "conv_a": "conv1",
    "norm_a": "bn1",
    "conv_b": "conv2",
    "norm_b": "bn2",
    "skip": "shortcut",
}
NAMES = {
    **{f"block_{index}/{ours}": f"{index}.{BLOCK[ours]}" for index in (0, 1) for ours in BLOCK},
    "block_0": "0",
    "block_1": "1",
    "head": "4",
}


def torch_network() -> torch.nn.Module:
    """The original, with weights and statistics drawn at random: fresh ones hide faults."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        TorchBlock(3, 8),
        TorchBlock(8, 16),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    )
    for name, value in network.state_dict().items():
        if "bn" in name and value.ndim:
            value.uniform_(0.5, 1.5)
    return network


def convert(network: torch.nn.Module) -> dict[str, Any]:
    """The port's variables, from the original's state dict."""
    state_dict = {key: value.numpy() for key, value in network.state_dict().items()}
    leaves = {}
    for path, name in NAMES.items():
        place = tuple(path.split("/"))
        if f"{name}.running_mean" in state_dict:
            leaves["params", *place, "scale"] = state_dict[f"{name}.weight"]
            leaves["batch_stats", *place, "mean"] = state_dict[f"{name}.running_mean"]
            leaves["batch_stats", *place, "var"] = state_dict[f"{name}.running_var"]
        elif f"{name}.weight" in state_dict:  # a block has none of its own
            weight = state_dict[f"{name}.weight"]
            order = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
            leaves["params", *place, "kernel"] = weight.transpose(order)
        if f"{name}.bias" in state_dict:
            leaves["params", *place, "bias"] = state_dict[f"{name}.bias"]
    return unflatten_dict(leaves)


def check(fault: str, train: bool) -> Comparison:
    """Compares the port that has this fault with the original, in training or in evaluation."""
    original = torch_network()
    images = np.random.default_rng(0).random((2, 16, 16, 3), dtype=np.float32)
    return compare_with_torch(
        FlaxNetwork(fault), convert(original), original, images, train=train, names=NAMES
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fault", choices=FAULTS, default="padding", help="(default: padding)")
    parser.add_argument("--train", action="store_true", help="compare in training")
    options = parser.parse_args()
    configure_runtime()
    print(check(options.fault, options.train))


if __name__ == "__main__":
    sys.exit(run_command(main))
