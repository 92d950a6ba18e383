"""Fine-tuning: a start from other weights, and parts that stay as they are, to the bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from resnet_flax import ResNet
from resnet_flax.errors import InputError
from resnet_flax.runs.config import TrainConfig
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.position import Position
from resnet_flax.training.recipes import RECIPES, build_optimizer, freeze
from resnet_flax.training.step import Images, TrainState, create_train_state, train_step
from resnet_flax.weights import (
    load_safetensors,
    save_safetensors,
    start_from,
    to_torch,
    variable_shapes,
)
from tests.support.small_run import checkpoints_of

FAST, D2L = RECIPES["fast"], RECIPES["d2l"]
PARTS = ("stem", "layer1", "layer2")


def network(**fields) -> ResNet:
    return ResNet((1, 1), **{"stem": "cifar", "channels": 8, "num_classes": 4, **fields})


def data(channels: int = 1) -> Images:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, 8, 8, channels), np.uint8)
    return Images.place(images, np.arange(8, dtype=np.int32) % 4)


def random_variables(model: ResNet, channels: int = 1, seed: int = 0) -> dict:
    """Drawn by NumPy, since a compiled initialisation takes seconds."""
    generator = np.random.default_rng(seed)
    shapes = variable_shapes(model, channels)
    leaves = {
        leaf: jnp.asarray(generator.uniform(0.5, 1, spec.shape) / spec.shape[0], jnp.float32)
        for leaf, spec in shapes.items()
    }
    return unflatten_dict(leaves)


def new_state(
    model: ResNet, channels: int = 1, seed: int = 0, recipe=D2L, variables=None
) -> TrainState:
    variables = variables or random_variables(model, channels, seed)
    optimizer = freeze(build_optimizer(recipe, 0.1, 10), model)
    average = recipe.average_decay > 0
    return create_train_state(
        model, optimizer, data(channels), seed, average=average, variables=variables
    )


@functools.cache
def compiled(count: int, recipe):
    """A new state, and the compiled step for it."""
    state = new_state(network(frozen_stages=count), recipe=recipe)
    arguments = (state, Metrics.empty(), *data())
    return state, train_step.lower(*arguments, image_size=8, **recipe.step_options()).compile()


def trained(state: TrainState, step, steps: int = 3) -> TrainState:
    state = jax.tree.map(jnp.copy, state)
    for _ in range(steps):
        state, _ = step(state, Metrics.empty(), *data())
    return state


def parts(variables) -> dict:
    """Part -> its parameters and statistics."""
    names = {"stem": ("conv1", "bn1"), "layer1": ("layer1",), "layer2": ("layer2",), "fc": ("fc",)}
    return {
        part: [variables[kind].get(name) for kind in ("params", "batch_stats") for name in group]
        for part, group in names.items()
    }


def same(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize(("count", "recipe"), [(0, D2L), (2, D2L), (1, FAST), (3, FAST)])
def test_the_first_parts_stay_to_the_bit_and_the_others_learn(count, recipe):
    before, step = compiled(count, recipe)
    after = trained(before, step)
    found = [{"params": after.params, "batch_stats": after.batch_stats}, after.variables]
    for variables in found:  # the newest, and the averages
        old, new = parts(before.variables), parts(variables)
        kept = {part for part in old if same(old[part], new[part])}
        assert kept == set(PARTS[:count])


def test_frozen_parts_normalise_by_their_running_statistics():
    model = network(frozen_stages=3)
    state = new_state(model)
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    logits, _ = train(state.variables, images)
    np.testing.assert_array_equal(logits, jax.jit(model.apply)(state.variables, images))


def test_the_last_normalisation_of_a_network_with_preactivation_learns():
    model = network(frozen_stages=3, preactivation=True)
    state = new_state(model)
    updates, _ = state.tx.update(state.params, state.opt_state, state.params)
    moved = {name for name, part in updates.items() if any(map(np.any, jax.tree.leaves(part)))}
    assert moved == {"norm", "fc"}


def test_gradients_that_nothing_needs_cost_nothing():
    costs = [compiled(count, D2L)[1].cost_analysis()["flops"] for count in (0, 2)]
    assert costs[1] < 0.8 * costs[0]


def test_a_frozen_run_can_be_saved_and_resumed(tmp_path):
    state = trained(*compiled(1, FAST))
    with checkpoints_of(TrainConfig(run_dir=tmp_path, freeze_stages=1)) as folder:
        folder.save(state, Position(steps=3))
    fresh = new_state(network(frozen_stages=1), seed=9, recipe=FAST)
    with checkpoints_of(TrainConfig(run_dir=tmp_path, freeze_stages=1, resume=True)) as folder:
        restored, _ = folder.restore(fresh)
    chex.assert_trees_all_equal(jax.tree.leaves(restored), jax.tree.leaves(state))
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)


def test_more_parts_than_there_are():
    with pytest.raises(
        InputError, match="`freeze_stages` must be at most 3, the stem and 2 stages"
    ):
        new_state(network(frozen_stages=4))


def test_averages_start_from_the_file_too(tmp_path):
    old = new_state(network(), channels=3)
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, to_torch(network(), old.variables))
    state, step = compiled(1, FAST)
    model = state.apply_fn.__self__
    variables = start_from(str(path), load_safetensors(path), model, channels=1, seed=0)
    new = create_train_state(model, state.tx, data(), average=True, variables=variables)
    chex.assert_trees_all_equal(new.params["layer2"], old.params["layer2"])
    chex.assert_trees_all_equal(
        new.variables, {"params": new.params, "batch_stats": new.batch_stats}
    )
    assert new.variables is new.average
    step(new, Metrics.empty(), *data())  # shares no donated buffer
