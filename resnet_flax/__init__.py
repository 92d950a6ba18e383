"""D2L's residual network in JAX and Flax Linen, equal to its PyTorch original."""

from resnet_flax.blocks import Bottleneck, Residual, Stage
from resnet_flax.metrics import Metrics
from resnet_flax.model import (
    ARCHITECTURES,
    FLAVOURS,
    ResNet,
    build_model,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from resnet_flax.pretrained import from_pretrained
from resnet_flax.runtime import configure_runtime
from resnet_flax.torch_weights import from_torch, load_safetensors, save_safetensors, to_torch
from resnet_flax.training import Images, TrainState, create_train_state, eval_step, train_step

__all__ = [
    "ARCHITECTURES",
    "FLAVOURS",
    "Bottleneck",
    "Images",
    "Metrics",
    "ResNet",
    "Residual",
    "Stage",
    "TrainState",
    "build_model",
    "configure_runtime",
    "create_train_state",
    "eval_step",
    "from_pretrained",
    "from_torch",
    "load_safetensors",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "save_safetensors",
    "to_torch",
    "train_step",
]
