"""The network: from uint8 pixels to logits, without files or flags."""

from resnet_flax.nn.blocks import Block, Bottleneck, Residual, Stage
from resnet_flax.nn.layers import BatchNorm, Conv, Dense
from resnet_flax.nn.ops.pooling import max_pool
from resnet_flax.nn.preprocessing import (
    Normalization,
    augment,
    mirrored_logits,
    prepare_images,
    resize,
)
from resnet_flax.nn.resnet import ARCHITECTURES, FLAVOURS, ResNet, build_model
from resnet_flax.nn.summary import summarize

__all__ = [
    "ARCHITECTURES",
    "FLAVOURS",
    "BatchNorm",
    "Block",
    "Bottleneck",
    "Conv",
    "Dense",
    "Normalization",
    "ResNet",
    "Residual",
    "Stage",
    "augment",
    "build_model",
    "max_pool",
    "mirrored_logits",
    "prepare_images",
    "resize",
    "summarize",
]
