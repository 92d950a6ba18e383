"""A network and data small enough to train within a test."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from resnet_flax.data import shuffled_batches
from resnet_flax.machine.devices import data_mesh
from resnet_flax.machine.interruption import Interruption
from resnet_flax.nn.resnet import ResNet
from resnet_flax.runs.checkpoints import Checkpoints
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.run_folder import CHECKPOINTS, open_run
from resnet_flax.training.compilation import Programs
from resnet_flax.training.feed import ResidentFeed
from resnet_flax.training.loop import Job, train_epoch
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.position import EpochResult, Position
from resnet_flax.training.recipes import RECIPES
from resnet_flax.training.step import Images, TrainState, create_train_state, train_steps

MODEL = ResNet((1,), stem="cifar", num_classes=10, channels=8)  # few compile quickly
IMAGE_SIZE = 8
SGD = optax.sgd(0.05)  # one for all: with another object a step is compiled again


@partial(jax.jit, donate_argnums=0)
def steps(state: TrainState, metrics: Metrics, data: Images, batches: Any, count: Any) -> Any:
    return train_steps(state, metrics, data, batches, count, image_size=IMAGE_SIZE)


def random_data(count: int, seed: int = 0) -> Images:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 8, 8, 1), np.uint8)
    return Images.place(images, generator.integers(0, 10, count).astype(np.int32))


def new_state(
    data: Images,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
    average: bool = False,
) -> TrainState:
    return create_train_state(MODEL, optimizer or SGD, data, seed, average=average)


def feed_of(data: Images, batch_size: int) -> ResidentFeed:
    def batches(epoch: int) -> list[np.ndarray]:
        return shuffled_batches(len(data.labels), batch_size, seed=0, epoch=epoch)

    return ResidentFeed(data, data, batches, data_mesh())


def new_job(data: Images, batch_size: int, **changes: Any) -> Job:
    job = Job(
        feed=feed_of(data, batch_size),
        epochs=1,
        step_options={"image_size": IMAGE_SIZE, **RECIPES["d2l"].step_options()},
        eval_options={"image_size": IMAGE_SIZE},
        mesh=data_mesh(),
    )
    return job._replace(**changes)


def checkpoints_of(config: TrainConfig) -> Checkpoints:
    """Those of the run that the configuration asks for."""
    return Checkpoints(open_run(config) / CHECKPOINTS)


class Steps(Programs):
    """All programs are one, that is compiled when it is called; each call claims a wait."""

    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait

    def __call__(self, name: Any, *arguments: Any) -> Any:
        self.waited += self.wait
        return steps(*arguments)


def run_epoch(
    state: TrainState, data: Images, batch_size: int, epoch: int = 1
) -> tuple[TrainState, Metrics]:
    job = new_job(data, batch_size)
    results = [EpochResult(number, 0.0, 0.0, 0.0, 1.0, 1.0) for number in range(1, epoch)]
    state, position = train_epoch(
        job,
        state,
        Position(results),
        Steps(),
        on_step=lambda *_: None,
        save=lambda *_: None,
        interruption=Interruption(),
    )
    return state, position.metrics
