"""A run folder as train.py leaves it, of a network small enough for tests."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from resnet_flax.data import FASHION_MNIST_CLASSES, Dataset
from resnet_flax.inference.pretrained import Network
from resnet_flax.nn.resnet import ResNet
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.results import write_results
from resnet_flax.runs.run_folder import open_run
from resnet_flax.training.position import EpochResult
from resnet_flax.weights import save_safetensors, to_torch, variable_shapes

MODEL = ResNet((1, 1), channels=8, stem="small")
RESULTS = [EpochResult(1, 1.5, 0.4, 0.5, 100.0, 9.0), EpochResult(2, 1.0, 0.6, 0.65, 90.0, 9.5)]


class FinishedRun(NamedTuple):
    """A folder, and what is in it."""

    folder: Path
    network: Network
    variables: Any
    test_data: Dataset


def new_network(model: ResNet = MODEL, **changes: Any) -> Network:
    fields: dict[str, Any] = {
        "model": model,
        "classes": FASHION_MNIST_CLASSES,
        "image_shape": (28, 28, 1),
        "image_size": 28,
    }
    return Network(**fields | changes)


def new_variables(network: Network) -> Any:
    """Random, the running statistics too, so that no two images get the same answer."""
    random = np.random.default_rng(0)
    leaves = {}
    for leaf, spec in variable_shapes(network.model, network.image_shape[-1]).items():
        if leaf[-1] == "kernel":
            values = random.normal(0, np.prod(spec.shape[:-1]) ** -0.5, spec.shape)
        else:
            low = {"bias": -0.1, "mean": -0.1}.get(leaf[-1], 0.5)
            values = random.uniform(low, low + 0.2, spec.shape)
        leaves[leaf] = values.astype(np.float32)
    return unflatten_dict(leaves)


def random_images(count: int, seed: int = 0) -> Dataset:
    """Fashion-MNIST's shape: bright noise in the middle, darkness around it."""
    random = np.random.default_rng(seed)
    images = np.zeros((count, 28, 28, 1), np.uint8)
    images[:, 4:24, 6:22] = random.integers(0, 256, (count, 20, 16, 1))
    return Dataset(images, random.integers(0, 10, count).astype(np.int32))


def finish_run(folder: Path, network: Network, **flags: Any) -> FinishedRun:
    """Writes the folder."""
    variables, data = new_variables(network), random_images(60)
    config = TrainConfig(run_dir=folder, image_size=network.image_size, **flags)
    open_run(config, network.as_json())
    write_results(folder, config, network, variables, data, RESULTS)
    return FinishedRun(folder, network, variables, data)


def write_pretrained(folder: Path, network: Network) -> Any:
    """Writes the two files that a network is loaded from; returns its variables."""
    variables = new_variables(network)
    (folder / "config.json").write_text(json.dumps({"network": network.as_json()}))
    save_safetensors(folder / "model.safetensors", to_torch(network.model, variables))
    return variables
