"""Trains a residual network on Fashion-MNIST: ``python train.py --epochs 10`` is D2L's run."""

import sys

import numpy as np

from resnet_flax.checkpoint import RunFolder
from resnet_flax.command_line import parse_config, run_command
from resnet_flax.config import TrainConfig
from resnet_flax.data import load_fashion_mnist, shuffled_batches
from resnet_flax.metrics import EpochResult, final_report
from resnet_flax.model import build_model
from resnet_flax.plotting import plot_curves
from resnet_flax.progress import Progress
from resnet_flax.recipes import RECIPES, build_optimizer
from resnet_flax.runtime import configure_runtime, device_name, keep_compiled_programs
from resnet_flax.torch_weights import save_safetensors, to_torch
from resnet_flax.training import Images, TrainState, check_batches, create_train_state, fit


def train(config: TrainConfig) -> None:
    """The whole job: data, model, training, results."""
    configure_runtime()
    keep_compiled_programs()
    progress = Progress(config)

    train_data, test_data = load_fashion_mnist(config.data_dir, report=progress.say)
    train_data = train_data.take(config.train_examples)
    test_data = test_data.take(config.test_examples)

    def batches(epoch: int) -> list[np.ndarray]:
        return shuffled_batches(len(train_data), config.batch_size, seed=config.seed, epoch=epoch)

    train_set = Images.place(train_data.images, train_data.labels)
    test_set = Images.place(test_data.images, test_data.labels)

    check_batches(batches(1), config.image_size)

    folder = RunFolder(config)
    progress.say(f"run folder: {folder.path}")
    recipe = RECIPES[config.recipe]
    model = build_model(config.model, dtype=config.dtype, **recipe.model_fields)
    steps = config.epochs * len(batches(1))
    optimizer = build_optimizer(recipe, config.learning_rate, steps)
    state = create_train_state(model, optimizer, train_set, config.seed, recipe)
    state, results = folder.restore(state)

    def keep(state: TrainState, results: list[EpochResult]) -> None:
        folder.save(state, results)
        plot_curves(results, folder.path / "curves.png")
        progress.epoch_ended(results[-1])

    state, results = fit(
        state,
        train_set,
        test_set,
        batches=batches,
        epochs=config.epochs,
        image_size=config.image_size,
        recipe=recipe,
        progress=progress,
        on_epoch_end=keep,
        results=results,
    )
    layout = "torchvision" if model.norm_shortcut else "d2l"
    save_safetensors(folder.path / "model.safetensors", to_torch(model, state.variables, layout))
    print(final_report(results, device_name()))


if __name__ == "__main__":
    sys.exit(run_command(lambda: train(parse_config())))
