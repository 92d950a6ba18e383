"""Trains a residual network: the whole job, from flags to results."""

import gc
import sys

import jax
import numpy as np

from resnet_flax.commands.command_line import parse_config, run_command
from resnet_flax.data import bright_border, load_dataset, shuffled_batches
from resnet_flax.inference.pretrained import Network
from resnet_flax.machine.devices import data_mesh, join_processes, replicate
from resnet_flax.machine.interruption import Interruption
from resnet_flax.machine.runtime import configure_runtime, device_name, keep_compiled_programs
from resnet_flax.nn.resnet import build_model
from resnet_flax.runs.checkpoints import RunFolder
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.plotting import plot_curves
from resnet_flax.runs.results import write_results
from resnet_flax.runs.tensorboard import import_tensorboard, write_events
from resnet_flax.training.loop import Job, check_batches, fit
from resnet_flax.training.metrics import final_report
from resnet_flax.training.position import Position
from resnet_flax.training.progress import Progress
from resnet_flax.training.recipes import RECIPES, build_optimizer, freeze
from resnet_flax.training.step import Images, TrainState, create_train_state
from resnet_flax.weights import start_from


def train(config: TrainConfig, interruption: Interruption) -> None:
    """The whole job: data, model, training, results."""
    gc.freeze()  # what was imported stays: looking through it again costs each start half a second
    configure_runtime(deterministic=config.deterministic)
    keep_compiled_programs()
    join_processes(config.coordinator, config.num_processes, config.process_id)
    mesh = data_mesh()
    progress = Progress(config)
    if config.tensorboard:
        import_tensorboard()  # now, and not after the first epoch, it may turn out to be missing

    train_data, test_data, classes, fit_of_images = load_dataset(
        config.dataset, config.data_dir, image_size=config.image_size, seed=config.seed
    )
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

    model = build_model(
        config.model,
        config.flavour,
        num_classes=len(classes),
        frozen_stages=config.freeze_stages,
        dtype=config.dtype,
        **recipe.model_fields,
    )
    steps = config.epochs * len(batches(1))
    optimizer = freeze(build_optimizer(recipe, config.learning_rate, steps), model)
    variables = None
    if config.init:
        variables = start_from(
            config.init,
            model,
            channels=train_data.images.shape[-1],
            seed=config.seed,
        )
    state = create_train_state(model, optimizer, job.train_set, config.seed, recipe, variables)
    network = Network(
        model=model,
        classes=classes,
        image_shape=train_data.images.shape[1:],
        image_size=config.image_size,
        flip=recipe.flip,
        dark_background=not bright_border(train_data.images),
        dataset=config.dataset,
        seed=config.seed,
        fit=fit_of_images,
    )

    with RunFolder(config, progress.say, network.as_json()) as folder:
        if jax.process_index() == 0:
            progress.say(f"run folder: {folder.path}")
        with interruption.postponed():  # Orbax, cut off while it reads, prints tracebacks
            state, position = folder.restore(state)
        state = replicate(state, mesh)

        def save(state: TrainState, position: Position) -> None:
            folder.save(state, position)
            if position.steps == 0 and jax.process_index() == 0:
                plot_curves(position.results, folder.path / "curves.png")
                if config.tensorboard:
                    write_events(position.results, folder.path)
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
