"""Trains a residual network: the whole job, from a configuration to results."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_flax.data import (
    BatchStream,
    LazyImages,
    Resizing,
    Splits,
    bright_border,
    default_workers,
    load_dataset,
    shuffled_batches,
)
from resnet_flax.errors import one_line
from resnet_flax.inference.pretrained import Network, read_network, read_tensors
from resnet_flax.machine.devices import (
    STREAMED_SHARE,
    data_mesh,
    join_processes,
    local_rows,
    memory,
    replicate,
)
from resnet_flax.machine.interruption import Interruption
from resnet_flax.machine.runtime import configure_runtime, keep_compiled_programs, start_backend
from resnet_flax.nn.preprocessing import IMAGENET_NORMALIZATION, Normalization
from resnet_flax.nn.resnet import ResNet, architecture, build_model
from resnet_flax.runs.checkpoints import Checkpoints
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.plotting import plot_curves
from resnet_flax.runs.results import write_results
from resnet_flax.runs.run_folder import CARD, CHECKPOINTS, CURVES, open_run, resolve, write_metrics
from resnet_flax.runs.tensorboard import import_tensorboard, write_events
from resnet_flax.training.feed import Feed, ResidentFeed, StreamedFeed
from resnet_flax.training.loop import Job, check_batches, fit
from resnet_flax.training.position import EpochResult, Position
from resnet_flax.training.progress import Progress
from resnet_flax.training.recipes import RECIPES, build_optimizer, freeze
from resnet_flax.training.step import Images, TrainState, create_train_state, whole_share
from resnet_flax.weights import load_safetensors, start_from

logger = logging.getLogger(__name__)

SAMPLE = 256  # images that tell how bright those on the disk are
# Beside a GPU's epochs of a second, drawing them took Python from the steps, a sixth of the speed.
SECONDS_BETWEEN_CURVES = 10.0


class Run(NamedTuple):
    """A finished training."""

    model: ResNet
    variables: dict[str, Any]  # {"params": ..., "batch_stats": ...}, what model.apply takes
    results: list[EpochResult]
    folder: Path | None  # what it left behind; None in all processes of a run but the first


def train(
    config: TrainConfig,
    *,
    epoch_ended: Callable[[EpochResult], None] = lambda result: None,
    interruption: Interruption | None = None,
) -> Run:
    """Trains a network, from loading the data to weights, pictures and a model card.

    It works in a notebook and in a thread, and several times in one process. What happens on the
    way goes to the logger ``resnet_flax``. ``epoch_ended`` is called in the first process alone;
    without an ``interruption`` no signal is watched for.

    Raises:
        InputError: when something asked for is not there or does not fit, or a file cannot be
            written.
        TrainingError: when the loss is no longer finite, a checkpoint cannot be written, or an
            image that is decoded while training cannot be read.
        Interrupted: when a watched signal came; what was reached is saved.
    """
    config = resolve(config)
    interruption = interruption or Interruption()
    configure_runtime(deterministic=config.deterministic)
    keep_compiled_programs()
    join_processes(config.coordinator, config.num_processes, config.process_id)
    start_backend()
    first = jax.process_index() == 0
    if not first:
        logging.getLogger("resnet_flax").setLevel(logging.WARNING)
    if config.tensorboard:
        import_tensorboard()  # now, and not after the first epoch, it may turn out to be missing
    mesh = data_mesh()
    recipe = RECIPES[config.recipe]

    pretrained = read_network(config.init) if config.init and config.from_network else None
    model, config = choose_model(config, pretrained)
    data = load_data(config, resizing_for(config.image_size, pretrained, recipe.crop_share))
    if config.stream == "auto":  # what a resumed run does too, on any machine
        streamed = isinstance(data.train.images, LazyImages)
        config = dataclasses.replace(config, stream="always" if streamed else "never")
    model = model.clone(
        num_classes=len(data.classes),
        frozen_stages=config.freeze_stages,
        normalization_groups=config.normalization_groups,
    )
    normalization = choose_normalization(config, pretrained, data.train.images.shape[-1])

    inputs = {"image_size": config.image_size, "normalization": normalization}
    job = Job(
        feed=feed_of(config, data, mesh),
        epochs=config.epochs,
        step_options={**inputs, **step_options(config, data)},
        eval_options={**inputs, "flip": recipe.flip_test},
        mesh=mesh,
        seconds_between_checkpoints=config.checkpoint_seconds,
    )
    check_batches(job.feed.sizes, config.image_size, model.total_stride)
    state = initial_state(config, model, data, len(job.feed.sizes))
    network = describe_network(config, model, data, normalization)
    folder = open_run(config, network.as_json()) if first else None
    with (
        Checkpoints(folder / CHECKPOINTS if folder else None) as checkpoints,
        ThreadPoolExecutor(1) as background,
    ):
        logger.info("run folder: %s", folder)
        with interruption.postponed():  # Orbax, cut off while it reads, prints tracebacks
            state, position = checkpoints.restore(state)
        state = replicate(state, mesh)

        def keep_epoch(state: TrainState, position: Position) -> None:
            if folder:
                result = position.results[-1]
                checkpoints.save(state, position, result.test_acc)
                write_metrics(folder, position.results)
                background.submit(show_progress, folder, config, position.results)
                epoch_ended(result)
                if result.epoch == config.epochs:  # a signal after the loop would end the writing
                    checkpoints.finish()

        state, position = fit(
            job,
            state,
            position,
            progress=Progress(config.epochs, config.image_size),
            save=checkpoints.save,
            epoch_ended=keep_epoch,
            interruption=interruption,
        )
    if folder:
        logger.info("drawing pictures, writing %s", folder / CARD)
        write_results(folder, config, network, state.variables, data.test, position.results)
    return Run(model, state.variables, position.results, folder)


def show_progress(folder: Path, config: TrainConfig, results: list[EpochResult]) -> None:
    """Draws the curves, not too often, and writes TensorBoard's events; a fault stops no run."""
    curves = folder / CURVES
    try:
        age = time.time() - curves.stat().st_mtime if curves.exists() else math.inf
        if abs(age) > SECONDS_BETWEEN_CURVES:
            plot_curves(results, curves)
        if config.tensorboard:
            write_events(results, folder)
    except Exception as error:  # Matplotlib and tensorboardX raise errors of many kinds
        logger.warning("the progress is not shown (%s)", one_line(error)[:200])


def choose_model(config: TrainConfig, pretrained: Network | None) -> tuple[ResNet, TrainConfig]:
    """The network to train, and the configuration with what the pretrained network fills in."""
    if pretrained is None:
        return build_model(config.model, config.flavour, dtype=config.dtype), config
    model = pretrained.model.clone(dtype=config.dtype)
    if config.model or config.flavour:
        name, flavour = architecture(model) or ("resnet18", "torchvision")
        model = build_model(config.model or name, config.flavour or flavour, dtype=config.dtype)
    told = dict(zip(("model", "flavour"), architecture(model) or (None, None), strict=True))
    size = config.image_size or pretrained.image_size
    return model, dataclasses.replace(config, image_size=size, **told)  # type: ignore[arg-type]


def resizing_for(
    image_size: int, pretrained: Network | None, crop_share: float = 1.0
) -> Resizing | None:
    """A pretrained network's way from pictures to squares, for squares of another size.

    Where there is none, the middle is cropped if the share, a recipe's, is less than 1.
    """
    if pretrained and pretrained.resizing:
        side = pretrained.resizing.side * image_size // pretrained.image_size
        return pretrained.resizing._replace(side=max(image_size, side))
    return Resizing(round(image_size / crop_share)) if crop_share < 1 else None


def choose_normalization(
    config: TrainConfig, pretrained: Network | None, channels: int
) -> Normalization | None:
    """The images' normalisation: what is asked for, or the pretrained network's."""
    chosen = pretrained.normalization if pretrained else None
    if config.normalization:
        chosen = IMAGENET_NORMALIZATION if config.normalization == "imagenet" else None
    if chosen is None:
        return None
    if len(chosen.mean) != channels:
        chosen = Normalization(*((sum(values) / len(values),) * channels for values in chosen))
    logger.info("images are normalised by mean %s and standard deviation %s", *chosen.as_text())
    return chosen


def load_data(config: TrainConfig, resizing: Resizing | None = None) -> Splits:
    """Loads the data set, and takes what the configuration asks for."""
    data = load_dataset(
        config.dataset,
        config.data_dir,
        image_size=config.image_size,
        seed=config.seed,
        follow_links=config.follow_links,
        resizing=resizing,
        stream_above={"always": 0, "never": math.inf}.get(config.stream, memory() * STREAMED_SHARE),
        draft=config.draft,
        skip_broken=config.skip_broken,
    )
    train_data, test_data = data.train, data.test
    if config.validation_examples:
        train_data, test_data = train_data.hold_out(config.validation_examples)
    train_data = train_data.take(config.train_examples)
    return data._replace(train=train_data, test=test_data.take(config.test_examples))


def feed_of(config: TrainConfig, data: Splits, mesh: Mesh) -> Feed:
    """The batches: of sets on the devices, or of images that stay on the disk."""

    def batches(epoch: int) -> list[np.ndarray]:
        return shuffled_batches(len(data.train), config.batch_size, seed=config.seed, epoch=epoch)

    if not isinstance(data.train.images, LazyImages):
        train, test = (Images.place(each.images, each.labels, mesh) for each in data[:2])
        return ResidentFeed(train, test, batches, mesh)
    sizes = [len(batch) for batch in batches(1)]
    test_size = whole_share(sizes[0], mesh)
    stream = BatchStream(
        data.train,
        data.test,
        config.epochs,
        config.batch_size,
        test_size,
        config.seed,
        RECIPES[config.recipe].random_resized_crop,
        {size: local_rows(size, mesh) for size in {*sizes, test_size}},
    )
    workers = default_workers() if config.workers is None else config.workers
    return StreamedFeed(
        partial(stream.read, workers=workers),
        sizes,
        stream.test_steps,
        data.train.images.shape[1:],
        mesh,
        config.skip_broken,
    )


def step_options(config: TrainConfig, data: Splits) -> dict[str, Any]:
    """What the recipe does in a step: images from the disk are cropped already."""
    options = RECIPES[config.recipe].step_options()
    if isinstance(data.train.images, LazyImages):
        options["random_resized_crop"] = 0.0
    return options


def initial_state(config: TrainConfig, model: ResNet, data: Splits, steps: int) -> TrainState:
    """The state that training begins with; ``steps`` are those of an epoch."""
    recipe, examples = RECIPES[config.recipe], (data.train.images, data.train.labels)
    optimizer = build_optimizer(recipe, config.learning_rate, config.epochs * steps)
    optimizer = freeze(optimizer, model)
    variables = None
    if config.init:
        read = read_tensors if config.from_network else load_safetensors
        tensors = read(config.init)
        channels = data.train.images.shape[-1]
        variables = start_from(config.init, tensors, model, channels=channels, seed=config.seed)
    average = recipe.average_decay > 0
    return create_train_state(
        model, optimizer, examples, config.seed, average=average, variables=variables
    )


def describe_network(
    config: TrainConfig, model: ResNet, data: Splits, normalization: Normalization | None
) -> Network:
    """What a run tells of its network."""
    images, in_memory = data.train.images, isinstance(data.train.images, np.ndarray)
    return Network(
        model=model,
        classes=data.classes,
        image_shape=data.train.images.shape[1:],
        image_size=config.image_size,
        flip=RECIPES[config.recipe].flip_test,
        dark_background=not bright_border(images if in_memory else images[:SAMPLE]),
        dataset=config.dataset,
        seed=config.seed,
        fit=data.fit,
        resizing=data.resizing,
        normalization=normalization,
    )
