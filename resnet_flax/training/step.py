"""The training state, and the compiled steps that change and evaluate it.

A step takes a batch of uint8 images from anywhere, and resizes and scales it on the device. Where a
whole data set fits there (`Images`), steps by index gather their batches, so that no image crosses
from host to device during training.
"""

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from flax.core import unfreeze
from flax.training import train_state
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8, UInt32

from resnet_flax.machine.devices import data_mesh, replicate, split_batch
from resnet_flax.nn.preprocessing import (
    Normalization,
    augment,
    check_shape,
    mirrored_logits,
    prepare_images,
)
from resnet_flax.training.metrics import Metrics

AnyArray = Array | np.ndarray


class TrainState(train_state.TrainState):
    """Everything that training changes: immutable; a step returns a new one.

    Attributes:
        batch_stats: running statistics of the batch normalisations.
        seed: uint32 scalar; with ``step`` it makes the random key of each step (dropout, shifts).
        average: running average of parameters and statistics; empty where none is kept.
    """

    batch_stats: chex.ArrayTree
    seed: UInt32[Array, ""]
    average: chex.ArrayTree = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, chex.ArrayTree]:
        """What ``model.apply`` takes in evaluation: the averages, if there are any."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


class Images(NamedTuple):
    """A data set on the device: images uint8 (N, H, W, C), labels int32 (N,)."""

    images: UInt8[Array, "N H W C"]
    labels: Int[Array, " N"]

    @classmethod
    def place(cls, images: np.ndarray, labels: np.ndarray, mesh: Mesh | None = None) -> Self:
        """Copies a data set to the device, or to each of several, where it stays.

        Raises:
            ValueError: when images or labels have another shape or dtype.
        """
        check_examples(images, labels)
        arrays = (images, labels)
        return cls(*(replicate(arrays, mesh) if mesh else jax.device_put(arrays)))


def create_train_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    examples: tuple[UInt8[AnyArray, "N H W C"], Int[AnyArray, " N"]],
    seed: int = 0,
    *,
    average: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> TrainState:
    """Initialises parameters and optimiser on the device.

    Args:
        model: called as ``model(images, train=...)``.
        optimizer: any Optax optimiser; one that follows the loss is given it (``value``).
        examples: images and labels, such as the first batch or `Images`. They tell the number of
            channels, and are checked; the initial values do not depend on them.
        seed: decides the initial parameters, and what is random in training.
        average: whether to keep a running average of parameters and statistics.
        variables: parameters and statistics to start from instead, copied.

    Raises:
        ValueError: when the examples have another shape or dtype, or a label is none of the
            model's classes.
    """
    images, labels = examples
    check_examples(images, labels)
    if num_classes := getattr(model, "num_classes", 0):
        check_label_range(labels, num_classes)
    if variables is None:
        within_jit = isinstance(jnp.zeros(()), jax.core.Tracer)  # which refuses compiler options
        init = _init if within_jit else _init_quickly
        variables = init(model, seed, images.shape[-1])
    else:  # a step gives the state's buffers away; the caller keeps its own
        variables = jax.tree.map(jnp.copy, unfreeze(dict(variables)))
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=optimizer,
        seed=jnp.uint32(seed),
        average=jax.tree.map(jnp.copy, dict(variables)) if average else {},
    )
    return state.replace(step=jnp.int32(0))  # an array, as after a step or a restore


def _init(model: nn.Module, seed: int, channels: int) -> Any:
    return model.init(jax.random.key(seed), jnp.zeros((1, 32, 32, channels)))


# LLVM takes 20 s of a CPU to optimise the random numbers of D2L's network, and 6 s at its first
# level, for the same bits.
_compiled_init = jax.jit(
    _init, static_argnums=(0, 2), compiler_options={"xla_backend_optimization_level": 1}
)


_settings = threading.Lock()  # the setting is one of the process


def _init_quickly(model: nn.Module, seed: int, channels: int) -> Any:
    """On a GPU a ready-made kernel draws the numbers, for the same bits.

    As kernels of their own they kept an H100's compiler busy for 12 s; so it takes 0.7 s in all.
    """
    name = "jax_threefry_gpu_kernel_lowering"
    with _settings:
        before = jax.config.values[name]
        jax.config.update(name, True)
        try:
            return _compiled_init(model, seed, channels)
        finally:
            jax.config.update(name, before)


@partial(
    jax.jit,
    static_argnames=(
        "image_size",
        "normalization",
        "label_smoothing",
        "random_resized_crop",
        "shift",
        "flip",
        "erase",
        "average_decay",
    ),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    metrics: Metrics,
    images: UInt8[Array, "B H W C"],
    labels: Int[Array, " B"],
    *,
    image_size: int,
    normalization: Normalization | None = None,
    label_smoothing: float = 0.0,
    random_resized_crop: float = 0.0,
    shift: int = 0,
    flip: bool = False,
    erase: float = 0.0,
    average_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One step of the optimiser on the cross-entropy's mean over the batch (D2L, `train_ch6`).

    Args:
        state: donated: its buffers are reused for the new state.
        metrics: the sums so far.
        images: uint8 (B, H, W, C).
        labels: integers (B,).
        image_size: height and width the images are resized to, in pixels.
        normalization: of their channels, scaled to [0, 1].
        label_smoothing: share of each label spread over all classes.
        random_resized_crop: least share of an image's area that a random crop keeps; 0 for none.
        shift: pixels by which an image is moved at random at most, along each axis.
        flip: mirror half of the images, at random.
        erase: share of the images in which a rectangle becomes noise.
        average_decay: weight of the past in the state's running average, where it keeps one.

    Returns:
        The new state, and the sums with this batch's loss and hits *before* the update.

    Raises:
        ValueError: when images or labels have another shape or dtype.
    """
    check_examples(images, labels)
    inputs = prepare_images(images, image_size, normalization)
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    inputs = augment(
        jax.random.fold_in(key, 1),
        inputs,
        random_resized_crop=random_resized_crop,
        shift=shift,
        flip=flip,
        erase=erase,
    )

    def loss_function(params: chex.ArrayTree) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            inputs,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        uniform = logits.mean(-1) - jax.nn.logsumexp(logits, -1)  # log-probabilities' mean
        share = label_smoothing
        objective = (1 - share) * losses - share * uniform if share else losses
        return objective.mean(), (updates["batch_stats"], logits, losses)

    differentiated = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    (loss, (batch_stats, logits, losses)), gradients = differentiated
    # Flax's apply_gradients keeps the loss from optimisers that follow it.
    updates, opt_state = optax.with_extra_args_support(state.tx).update(
        gradients, state.opt_state, state.params, value=loss
    )
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats=batch_stats,
    )
    if state.average:
        new = {"params": state.params, "batch_stats": state.batch_stats}
        average = moving_average(average_decay, state.average, new, jnp.asarray(state.step))
        state = state.replace(average=average)
    return state, metrics.add(logits, losses, labels, jnp.ones_like(losses))


def train_steps(
    state: TrainState,
    metrics: Metrics,
    data: Images,
    batches: Int[Array, "S B"],
    count: Int[Array, ""] | int,
    **options: Any,
) -> tuple[TrainState, Metrics]:
    """Several calls of `train_step` as one program, so that the host need not start each.

    Args:
        state: as in `train_step`.
        metrics: the sums so far.
        data: the whole training set, on the device.
        batches: int32 (S, B), the samples of each step.
        count: how many of the S steps are done; one program serves any number.
        **options: of `train_step`.
    """

    def step(index: Any, reached: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        images, labels = data.images[batches[index]], data.labels[batches[index]]
        return train_step(*reached, images, labels, **options)

    if len(batches) == 1:  # a CPU has no quick convolution inside a loop
        return step(0, (state, metrics))
    return jax.lax.fori_loop(0, count, step, (state, metrics))


@partial(jax.jit, static_argnames=("image_size", "normalization", "flip"))
def eval_step(
    state: TrainState,
    metrics: Metrics,
    images: UInt8[Array, "B H W C"],
    labels: Int[Array, " B"],
    weights: Float[Array, " B"],
    *,
    image_size: int,
    normalization: Normalization | None = None,
    flip: bool = False,
) -> Metrics:
    """Adds a batch of the test set to the sums, normalised by the running statistics.

    Args:
        state: what to evaluate.
        metrics: the sums so far.
        images: uint8 (B, H, W, C).
        labels: integers (B,).
        weights: float32 (B,), 1 for a sample and 0 for padding.
        image_size: height and width the images are resized to, in pixels.
        normalization: of their channels, scaled to [0, 1].
        flip: average the logits with those of the mirrored images.
    """
    inputs = prepare_images(images, image_size, normalization)
    logits = mirrored_logits(partial(state.apply_fn, state.variables, train=False), inputs, flip)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return metrics.add(logits, losses, labels, weights)


@partial(jax.jit, static_argnames=("image_size", "normalization", "flip"))
def eval_by_index(
    state: TrainState, metrics: Metrics, data: Images, indices: Any, weights: Any, **options: Any
) -> Metrics:
    """`eval_step` on the samples (B,) of a data set on the device."""
    images, labels = data.images[indices], data.labels[indices]
    return eval_step(state, metrics, images, labels, weights, **options)


def evaluate(
    state: TrainState,
    data: Images,
    *,
    batch_size: int,
    image_size: int,
    normalization: Normalization | None = None,
    flip: bool = False,
    mesh: Mesh | None = None,
) -> Metrics:
    """Loss and accuracy over a whole data set, in eval mode, each sample counted once.

    Args:
        state: the parameters and running statistics to evaluate.
        data: the set, on the device.
        batch_size: images at a time; it changes nothing in the result.
        image_size: height and width the images are resized to, in pixels.
        normalization: of their channels, scaled to [0, 1].
        flip: average each image's logits with those of its mirror image.
        mesh: the devices that share the work, if there are several.
    """
    mesh = mesh or data_mesh()
    options = {"image_size": image_size, "normalization": normalization, "flip": flip}
    metrics = replicate(Metrics.empty(), mesh)
    for arguments in evaluation_batches(data, batch_size, mesh):
        metrics = eval_by_index(state, metrics, *arguments, **options)
    return metrics


def evaluation_batches(
    data: Images, batch_size: int, mesh: Mesh
) -> Iterator[tuple[Images, jax.Array, jax.Array]]:
    """Yields what `eval_by_index` takes of a data set, batch by batch."""
    batch_size, count = whole_share(batch_size, mesh), len(data.labels)
    for start in range(0, count, batch_size):
        wanted = np.arange(start, start + batch_size, dtype=np.int32)
        # Padding keeps one compiled shape; in eval mode a sample cannot touch another's logits.
        weights = split_batch((wanted < count).astype(np.float32), mesh)
        yield data, split_batch(np.minimum(wanted, count - 1), mesh), weights


def whole_share(batch_size: int, mesh: Mesh) -> int:
    """The next multiple of the number of devices."""
    return -(-batch_size // mesh.size) * mesh.size


def moving_average(decay: float, average: Any, new: Any, step: jax.Array) -> Any:
    """One step of the exponential moving average; in the first steps it forgets faster."""
    share = jnp.minimum(decay, (1 + step) / (10 + step))
    updated = optax.incremental_update(new, average, 1 - share)
    # Rounding must not move the average of what stays the same: frozen parts keep their bits.
    return jax.tree.map(lambda a, b, c: jnp.where(a == b, a, c), average, new, updated)


def check_examples(images: Any, labels: Any) -> None:
    """Makes sure that a data set is uint8 images (N, H, W, C) and integer labels (N,).

    Raises:
        ValueError: naming the argument, what it is, and what it must be.
    """
    check_shape(images)
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 in 0..255, not {images.dtype}")
    if labels.ndim == 2:
        raise ValueError(
            f"labels must be integers of shape (N,), not of shape {labels.shape}: of one-hot "
            "labels take labels.argmax(-1)"
        )
    if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {images.shape[:1]}, one for each image, not "
            f"{labels.dtype} of shape {labels.shape}"
        )


def check_label_range(labels: Any, num_classes: int) -> None:
    """Makes sure that labels are among 0, 1, ..., num_classes - 1.

    Raises:
        ValueError: when one is not; the cross-entropy would silently be wrong.
    """
    labels = np.asarray(labels)
    smallest, largest = labels.min(), labels.max()
    if smallest < 0 or largest >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1} for {num_classes} classes, not in "
            f"{smallest}..{largest}"
        )
