"""A network and data small enough to train within a test."""

from functools import partial

import numpy as np
import optax

from resnet_flax.data import shuffled_batches
from resnet_flax.metrics import Metrics
from resnet_flax.model import ResNet
from resnet_flax.training import (
    Images,
    TrainState,
    create_train_state,
    train_epoch,
    train_step,
)

MODEL = ResNet((1,), stem="cifar", num_classes=10)
IMAGE_SIZE = 8
STEP = partial(train_step, image_size=IMAGE_SIZE)


def random_data(count: int, seed: int = 0) -> Images:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 8, 8, 1), np.uint8)
    return Images.place(images, generator.integers(0, 10, count).astype(np.int32))


def new_state(
    data: Images, optimizer: optax.GradientTransformation | None = None, seed: int = 0
) -> TrainState:
    return create_train_state(MODEL, optimizer or optax.sgd(0.05), data, seed)


def run_epoch(
    state: TrainState, data: Images, batch_size: int, epoch: int = 1
) -> tuple[TrainState, Metrics]:
    batches = shuffled_batches(len(data.labels), batch_size, seed=0, epoch=epoch)
    steps = dict.fromkeys((len(batch) for batch in batches), STEP)  # jit keeps them compiled
    return train_epoch(state, data, batches, steps, epoch=epoch, on_step=lambda *_: None)
