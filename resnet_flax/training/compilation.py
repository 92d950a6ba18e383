"""The compiled programs of a run: which there are, and which are made when."""

import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import jax
from jax.sharding import Mesh

from resnet_flax.machine.devices import replicate, replicated
from resnet_flax.nn.ops.platform import traced_for
from resnet_flax.training.feed import Feed
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.step import TrainState

EVALUATION = "evaluation"


class Programs:
    """Programs that are compiled in the order in which they are first used.

    The first is ready at once, and the others are made while it computes, one after the other: a
    GPU's compiler measures kernels to choose among them, and side by side D2L's three took an H100
    78 s, the first alone 13 s.

    Use it in a ``with`` statement: at its end nothing is being compiled any more. What waits until
    there is no more use for it, as when a run is asked to stop, is never begun: ``wanted`` tells.

    Attributes:
        waited: seconds in which calls waited for the compiler.
    """

    waited = 0.0

    def __init__(
        self,
        lower: Mapping[Hashable, Callable[[], jax.stages.Lowered]],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._wanted = wanted
        (first, lower_first), *self._others = lower.items()
        self._compiling: dict[Hashable, Future[jax.stages.Compiled]] = {}
        self._background = ThreadPoolExecutor(1)
        self._compiled = {first: lower_first().compile()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._background.shutdown(cancel_futures=True)

    def __call__(self, name: Hashable, *arguments: Any) -> Any:
        """Calls a program; returns before the device is done."""
        if name not in self._compiled:
            started = time.perf_counter()
            self._compile_others()
            self._compiled[name] = self._compiling[name].result()
            self.waited += time.perf_counter() - started
        result = self._compiled[name](*arguments)
        if self._others and self._wanted():
            self._compile_others()
        return result

    def _compile_others(self) -> None:
        while self._others:  # traced here, where the caller's settings of JAX are in force
            name, lower = self._others.pop(0)
            self._compiling[name] = self._background.submit(lower().compile)


def compile_programs(
    state: TrainState,
    feed: Feed,
    done: int,
    *,
    mesh: Mesh,
    step_options: Mapping[str, Any],
    eval_options: Mapping[str, Any],
    wanted: Callable[[], bool] = lambda: True,
) -> Programs:
    """Compiles the steps for each shape of the batches, and the evaluation, ahead of time.

    Args:
        state: placed on the mesh.
        feed: tells the programs' arguments; the shapes of its calls are their names, and
            `EVALUATION` is that of the evaluation's.
        done: steps of the epoch under way that are done already.
        mesh: the devices.
        step_options: of `resnet_flax.training.train_step`.
        eval_options: of `resnet_flax.training.eval_step`.
        wanted: whether further programs are still of use.
    """
    everywhere = replicated(mesh)  # left to itself, the compiler might split the state
    train = jax.jit(
        partial(feed.train_step, **step_options), donate_argnums=0, out_shardings=everywhere
    )
    test = jax.jit(partial(feed.eval_step, **eval_options), out_shardings=everywhere)
    # The state's buffers are gone after the first call, its shapes are not.
    state, metrics, train_arguments, test_arguments = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=array.sharding, weak_type=array.weak_type
        ),
        (
            state,
            replicate(Metrics.empty(), mesh),
            feed.train_arguments(done),
            feed.test_arguments(),
        ),
    )

    def lowered(program: Any, *arguments: Any) -> jax.stages.Lowered:
        with traced_for(mesh.devices.flat[0].platform):
            return program.lower(state, metrics, *arguments)

    lower: dict[Hashable, Callable[[], jax.stages.Lowered]] = {
        shape: partial(lowered, train, *arguments) for shape, arguments in train_arguments.items()
    }
    lower[EVALUATION] = partial(lowered, test, *test_arguments)
    return Programs(lower, wanted)
