"""The algorithm: how a network learns. Writes no file."""

from resnet_flax.training.loop import Job, fit
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.position import EpochResult, Position
from resnet_flax.training.recipes import RECIPES, Recipe, build_optimizer, freeze
from resnet_flax.training.step import (
    Images,
    TrainState,
    create_train_state,
    eval_step,
    evaluate,
    train_step,
    train_steps,
)

__all__ = [
    "RECIPES",
    "EpochResult",
    "Images",
    "Job",
    "Metrics",
    "Position",
    "Recipe",
    "TrainState",
    "build_optimizer",
    "create_train_state",
    "eval_step",
    "evaluate",
    "fit",
    "freeze",
    "train_step",
    "train_steps",
]
