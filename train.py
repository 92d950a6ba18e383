"""Trains a residual network on Fashion-MNIST: ``python train.py --epochs 10`` is D2L's run."""

import os
import signal
import sys

for each in (signal.SIGINT, signal.SIGTERM):  # the imports take seconds, and there is nothing yet
    signal.signal(each, lambda signum, frame: os._exit(128 + signum))

import jax
import numpy as np

from resnet_flax.checkpoint import RunFolder
from resnet_flax.command_line import parse_config, run_command
from resnet_flax.config import TrainConfig
from resnet_flax.data import FASHION_MNIST_CLASSES, load_fashion_mnist, shuffled_batches
from resnet_flax.interruption import Interruption
from resnet_flax.loop import Job, fit
from resnet_flax.metrics import final_report
from resnet_flax.model import build_model
from resnet_flax.photos import bright_border
from resnet_flax.plotting import plot_curves
from resnet_flax.position import Position
from resnet_flax.pretrained import Network
from resnet_flax.processes import join_processes
from resnet_flax.progress import Progress
from resnet_flax.recipes import RECIPES, build_optimizer
from resnet_flax.results import write_results
from resnet_flax.runtime import configure_runtime, device_name, keep_compiled_programs
from resnet_flax.sharding import data_mesh, replicate
from resnet_flax.training import Images, TrainState, check_batches, create_train_state


def train(config: TrainConfig, interruption: Interruption) -> None:
    """The whole job: data, model, training, results."""
    configure_runtime(deterministic=config.deterministic)
    keep_compiled_programs()
    join_processes(config)
    mesh = data_mesh()
    progress = Progress(config)

    train_data, test_data = load_fashion_mnist(config.data_dir, report=progress.say)
    if config.validation_examples:
        train_data, test_data = train_data.hold_out(config.validation_examples)
    train_data = train_data.take(config.train_examples)
    test_data = test_data.take(config.test_examples)

    def batches(epoch: int) -> list[np.ndarray]:
        return shuffled_batches(len(train_data), config.batch_size, seed=config.seed, epoch=epoch)

    check_batches(batches(1), config.image_size)
    recipe = RECIPES[config.recipe]
    job = Job(
        train_set=Images.place(train_data.images, train_data.labels, mesh),
        test_set=Images.place(test_data.images, test_data.labels, mesh),
        batches=batches,
        epochs=config.epochs,
        image_size=config.image_size,
        recipe=recipe,
        mesh=mesh,
        seconds_between_checkpoints=config.checkpoint_seconds,
    )

    model = build_model(config.model, dtype=config.dtype, **recipe.model_fields)
    network = Network(
        model=model,
        classes=FASHION_MNIST_CLASSES,
        image_shape=train_data.images.shape[1:],
        image_size=config.image_size,
        flip=recipe.flip,
        dark_background=not bright_border(train_data.images),
    )

    with RunFolder(config, progress.say, network.as_json()) as folder:
        progress.say(f"run folder: {folder.path}")
        steps = config.epochs * len(batches(1))
        optimizer = build_optimizer(recipe, config.learning_rate, steps)
        state = create_train_state(model, optimizer, job.train_set, config.seed, recipe)
        state, position = folder.restore(state)
        state = replicate(state, mesh)

        def save(state: TrainState, position: Position) -> None:
            folder.save(state, position)
            if position.steps == 0 and jax.process_index() == 0:
                plot_curves(position.results, folder.path / "curves.png")
                progress.epoch_ended(position.results[-1])

        state, position = fit(
            job, state, position, progress=progress, save=save, interruption=interruption
        )
    if jax.process_index() == 0:
        progress.say(f"drawing pictures, writing {folder.path / 'README.md'}")
        write_results(folder.path, config, network, state.variables, test_data, position.results)
        print(final_report(position.results, device_name()))


def main() -> None:
    """Reads the flags and trains, until it is done or asked to stop."""
    with Interruption() as interruption:
        train(parse_config(), interruption)


if __name__ == "__main__":
    sys.exit(run_command(main))
