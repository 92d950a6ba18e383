"""A run's curves for TensorBoard, written without TensorFlow."""

import time
from pathlib import Path
from typing import Any

from resnet_flax.errors import InputError
from resnet_flax.training.position import EpochResult

TAGS = {
    "loss": "loss/train",
    "train_acc": "accuracy/train",
    "test_acc": "accuracy/test",
    "examples_per_sec": "examples_per_sec",
}


def import_tensorboard() -> Any:
    """The library that writes event files; raises `InputError` when it is not installed."""
    try:
        import tensorboardX
    except ImportError as error:
        raise InputError(
            "`tensorboard` needs tensorboardX, which is not installed: "
            'pip install "resnet_flax[tensorboard]"'
        ) from error
    return tensorboardX


def write_events(results: list[EpochResult], folder: Path) -> None:
    """Writes all epochs' figures into one event file, in the place of earlier ones.

    Rewritten from the results, it repeats no point, wherever a run was stopped and resumed. A
    TensorBoard that has read the earlier file is told to drop its points.
    """
    writer_of = import_tensorboard().SummaryWriter
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    ended = time.time() - sum(result.seconds for result in results)
    with writer_of(str(folder), purge_step=0, filename_suffix=f".{len(results)}") as writer:
        for result in results:
            ended += result.seconds
            for field, tag in TAGS.items():
                writer.add_scalar(tag, getattr(result, field), result.epoch, walltime=ended)
