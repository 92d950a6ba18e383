"""A run: its configuration, its folder, and the whole job from data to results."""

from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.train import Run, train

__all__ = ["Run", "TrainConfig", "train"]
