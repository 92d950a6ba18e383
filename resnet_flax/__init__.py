"""D2L's residual network in JAX and Flax Linen, equal to its PyTorch original."""

from resnet_flax.blocks import Bottleneck, Residual, Stage
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
from resnet_flax.runtime import configure_runtime

__all__ = [
    "ARCHITECTURES",
    "FLAVOURS",
    "Bottleneck",
    "ResNet",
    "Residual",
    "Stage",
    "build_model",
    "configure_runtime",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
