"""The compiled programs of a run's training steps: which are made when."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from resnet_flax.machine.devices import batch_sharding, data_mesh, replicate, replicated
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.step import Images, TrainState, train_steps


class TrainPrograms:
    """`resnet_flax.training.train_steps`, compiled for each shape of a run's batches.

    On a CPU the first shape's program is ready at once, and the others are made while its first
    call computes: training starts two seconds sooner, and no epoch waits for the compiler. An
    accelerator would be done long before, so there all are made first.

    Attributes:
        background: where they are compiled; leaving it as a context waits for that.
    """

    def __init__(
        self,
        lower: Callable[[tuple[int, ...]], jax.stages.Lowered],
        shapes: Iterable[tuple[int, ...]],
    ) -> None:
        first, *self._others = shapes
        self._lower = lower
        self._compiling: dict[tuple[int, ...], Future[jax.stages.Compiled]] = {}
        self.background = ThreadPoolExecutor()
        lowered = lower(first)
        if all_first := jax.default_backend() != "cpu":
            self._compile_others()
        self._compiled = {first: lowered.compile()}
        if all_first:
            for shape in self._compiling:
                self.program(shape)

    def __call__(
        self, state: TrainState, metrics: Metrics, data: Images, batches: Int[Array, "S B"]
    ) -> tuple[TrainState, Metrics]:
        """Like `train_steps`; returns before the device is done."""
        result: tuple[TrainState, Metrics] = self.program(batches.shape)(
            state, metrics, data, batches
        )
        self._compile_others()
        return result

    def program(self, shape: tuple[int, ...]) -> jax.stages.Compiled:
        """The one for batches of this shape, (S, B)."""
        if shape not in self._compiled:
            self._compile_others()
            self._compiled[shape] = self._compiling[shape].result()
        return self._compiled[shape]

    def _compile_others(self) -> None:
        while self._others:  # traced here, where the caller's settings of JAX are in force
            lowered = self._lower(shape := self._others.pop())
            self._compiling[shape] = self.background.submit(lowered.compile)


def compile_train_steps(
    state: TrainState,
    data: Images,
    shapes: Iterable[tuple[int, ...]],
    *,
    mesh: Mesh | None = None,
    **options: Any,
) -> TrainPrograms:
    """Compiles `resnet_flax.training.train_steps` ahead of time.

    Args:
        state: placed on the mesh, as is ``data``.
        data: the training set.
        shapes: of the batches, (S, B), each once, the first to be used first: steps in a call, and
            images in a step.
        mesh: the devices; all by default.
        **options: of `resnet_flax.training.train_step`.
    """
    mesh = mesh or data_mesh()
    steps = jax.jit(
        partial(train_steps, **options),
        donate_argnums=0,
        out_shardings=replicated(mesh),  # left to itself, the compiler might split the state
    )
    # The state's buffers are gone after the first call, its shapes are not.
    arguments = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=array.sharding, weak_type=array.weak_type
        ),
        (state, replicate(Metrics.empty(), mesh), data),
    )

    def lower(shape: tuple[int, ...]) -> jax.stages.Lowered:
        batches = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(shape, mesh))
        return steps.lower(*arguments, batches)

    return TrainPrograms(lower, shapes)
