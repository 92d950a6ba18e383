import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from jax.experimental import checkify

from resnet_flax.data import shuffled_batches
from resnet_flax.errors import InputError, TrainingError
from resnet_flax.nn.preprocessing import prepare_images
from resnet_flax.nn.resnet import build_model
from resnet_flax.training import step
from resnet_flax.training.loop import check_batches
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.step import Images, create_train_state, evaluate, train_step
from tests.support.small_run import IMAGE_SIZE, MODEL, new_state, random_data, run_epoch, steps

TRAIN = jax.jit(partial(MODEL.apply, train=True, mutable=["batch_stats"]))


def test_a_step_is_sgd_on_the_mean_cross_entropy():
    data = random_data(8)
    state = new_state(data)

    def loss(params):
        logits, update = MODEL.apply(
            {"params": params, "batch_stats": state.batch_stats},
            prepare_images(data.images, IMAGE_SIZE),
            train=True,
            mutable=["batch_stats"],
        )
        log_probabilities = jax.nn.log_softmax(logits)
        return -log_probabilities[jnp.arange(8), data.labels].mean(), update

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (expected_loss, update), gradients = gradient(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, state.params, gradients)
    after, metrics = train_step(state, Metrics.empty(), *data, image_size=IMAGE_SIZE)
    assert metrics.loss == pytest.approx(float(expected_loss), rel=1e-5)
    assert int(after.step) == 1
    chex.assert_trees_all_close(after.params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(after.batch_stats, update["batch_stats"], rtol=1e-5, atol=1e-6)


def test_a_gpu_draws_the_initial_values_by_a_ready_made_kernel(monkeypatch):
    texts = []

    def lowered(*arguments):
        traced = compiled_init.trace(*arguments)
        texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
        return compiled_init(*arguments)

    compiled_init = step._compiled_init
    monkeypatch.setattr(step, "_compiled_init", lowered)
    new_state(random_data(8))
    assert "@cu_threefry2x32_ffi" in texts[0]
    assert "shift_left" not in texts[0]  # no rounds of threefry are left to the compiler
    assert not jax.config.values["jax_threefry_gpu_kernel_lowering"]  # as it was


def test_the_state_is_immutable_and_donated():
    data = random_data(8)
    state = new_state(data)
    with pytest.raises(AttributeError):
        state.step = 3
    train_step(state, Metrics.empty(), *data, image_size=IMAGE_SIZE)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_training_learns_what_it_sees():
    data = random_data(32)
    state = new_state(data, optax.sgd(0.5))
    for epoch in range(1, 121):
        state, metrics = run_epoch(state, data, 32, epoch)
    assert metrics.accuracy > 0.9
    assert metrics.loss < 0.7


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    data = random_data(20)
    first, second = (run_epoch(new_state(data, seed=3), data, 8)[0] for _ in range(2))
    other, _ = run_epoch(new_state(data, seed=4), data, 8)
    chex.assert_trees_all_equal(first.variables, second.variables)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(first.variables, other.variables, rtol=0.1)


def test_the_last_smaller_batch_counts_and_normalises_by_its_own_images():
    data = random_data(11)
    state = new_state(data, optax.sgd(0.0))  # parameters stay, so that statistics tell the batches
    batches = shuffled_batches(11, 8, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [8, 3]
    variables = jax.tree.map(jnp.copy, state.variables)
    losses = []
    for batch in batches:
        images = prepare_images(data.images[batch], IMAGE_SIZE)
        logits, update = TRAIN(variables, images)
        variables = {**variables, **update}
        losses += list(optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[batch]))
    state, metrics = run_epoch(state, data, 8)
    assert int(metrics.count) == 11
    assert metrics.loss == pytest.approx(np.mean(losses), rel=1e-5)
    chex.assert_trees_all_close(state.batch_stats, variables["batch_stats"], rtol=1e-5, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("batch_size", [4, 7, 11, 64])
def test_evaluation_weighs_by_sample_whatever_the_batch_size(batch_size):
    data = random_data(11)
    state = new_state(data)
    logits = jax.jit(MODEL.apply)(state.variables, prepare_images(data.images, IMAGE_SIZE))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    metrics = evaluate(state, data, batch_size=batch_size, image_size=IMAGE_SIZE)
    assert int(metrics.count) == 11
    assert metrics.accuracy == pytest.approx(float((logits.argmax(-1) == data.labels).mean()))
    assert metrics.loss == pytest.approx(float(losses.mean()), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run():
    data = random_data(24)
    state = new_state(data, optax.sgd(1e30))
    with pytest.raises(TrainingError, match=re.compile(r"loss is (nan|inf) in epoch 1, step \d")):
        run_epoch(state, data, 8)


def test_a_last_batch_of_one_value_per_channel_is_refused_before_training():
    sizes = [len(batch) for batch in shuffled_batches(9, 8, seed=0, epoch=1)]
    with pytest.raises(InputError, match="last batch would hold 1 image of 28x28 pixels"):
        check_batches(sizes, 28, 32)
    check_batches(sizes, 33, 32)  # four values
    check_batches([8, 2], 28, 32)
    check_batches(sizes, 28, build_model("resnet8").total_stride)  # 4x4 values


def test_dropout_differs_by_step_and_by_seed():
    model = MODEL.clone(dropout_rate=0.5)
    data = random_data(8)
    losses = set()
    for seed, count in ((0, 2), (1, 1)):
        state = new_state(data, optax.sgd(0.0)).replace(apply_fn=model.apply, seed=jnp.uint32(seed))
        for _ in range(count):
            state, metrics = train_step(state, Metrics.empty(), *data, image_size=IMAGE_SIZE)
            losses.add(metrics.loss)
    assert len(losses) == 3


def test_metrics_count_padding_for_nothing():
    logits = jnp.asarray([[2.0, 0.0], [0.0, 2.0], [5.0, 0.0]])
    labels = jnp.asarray([0, 0, 0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    metrics = Metrics.empty().add(logits, losses, labels, jnp.asarray([1.0, 1.0, 0.0]))
    assert (int(metrics.correct), int(metrics.count)) == (1, 2)
    assert metrics.loss == pytest.approx(float(losses[:2].mean()))


def test_labels_out_of_range_cannot_arise_from_the_data(fashion_mnist):
    for dataset in fashion_mnist:
        assert set(np.unique(dataset.labels)) == set(range(10))
        assert Images.place(dataset.images, dataset.labels).images.dtype == jnp.uint8


def test_several_steps_at_once_are_the_same_steps():
    data = random_data(24)
    batches = np.arange(24, dtype=np.int32).reshape(3, 8)
    padded = np.concatenate([batches, batches[:1]])  # the fourth is not to be done
    together, sums = steps(new_state(data), Metrics.empty(), data, padded, 3)
    state, metrics = new_state(data), Metrics.empty()
    for indices in batches:
        images, labels = data.images[indices], data.labels[indices]
        state, metrics = train_step(state, metrics, images, labels, image_size=IMAGE_SIZE)
    assert int(together.step) == 3
    chex.assert_trees_all_close(together.variables, state.variables, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(sums, metrics, rtol=1e-5)


# --- Optimisers that public reports tell of.


def two_steps(optimizer, variables=None):
    """The parameters before and after, and the state."""
    data = random_data(8)
    state = create_train_state(MODEL, optimizer, data, variables=variables)
    before = jax.tree.map(np.array, state.params)
    for _ in range(2):
        state, _ = train_step(state, Metrics.empty(), *data, image_size=IMAGE_SIZE)
    return before, state.params, state


def test_a_masked_part_stays_as_it_is_though_the_variables_are_frozen():
    """google-deepmind/optax#160, #290: FrozenDicts beside a mask of plain ones."""
    state = new_state(random_data(8))
    body = {name: name != "fc" for name in state.params}
    optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), body))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    before, after, _ = two_steps(optimizer, freeze(variables))
    moved = {
        name: not np.array_equal(*map(first_leaf, (before[name], after[name]))) for name in body
    }
    assert moved == {name: not kept for name, kept in body.items()}


def first_leaf(tree):
    return jax.tree.leaves(tree)[0]


def test_an_optimiser_that_follows_the_loss_is_given_it():
    """google/flax#4471, pyro-ppl/numpyro#1955: reduce_on_plateau's ``value``."""
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    before, after, state = two_steps(optax.chain(optax.sgd(0.1), plateau))
    assert 0 < float(state.opt_state[1].best_value) < 10
    assert not np.array_equal(first_leaf(before), first_leaf(after))


def test_a_rate_on_a_schedule_and_steps_in_several_parts():
    """google-deepmind/optax#1532: of SGD, the same as without ``inject_hyperparams``."""
    rate = optax.linear_schedule(0.1, 0.0, 10)
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    _, plain, _ = two_steps(optax.sgd(rate))
    _, after, _ = two_steps(injected)
    chex.assert_trees_all_equal(after, plain)
    before, after, state = two_steps(optax.MultiSteps(injected, 2))
    assert float(state.opt_state.inner_opt_state.hyperparams["learning_rate"]) == pytest.approx(0.1)
    assert not np.array_equal(first_leaf(before), first_leaf(after))


def test_checkify_finds_no_fault_in_a_step_and_the_one_that_is_put_in():
    """jax-ml/jax#35871: checkify of compiled derivatives that are our own rules."""
    images = jnp.linspace(0, 1, 4 * 64).reshape(4, 8, 8, 1)
    variables = MODEL.init(jax.random.key(0), images)

    def loss(images):
        return MODEL.apply(variables, images, train=True, mutable=["batch_stats"])[0].sum()

    checked = jax.jit(checkify.checkify(jax.jit(jax.grad(loss)), errors=checkify.float_checks))
    assert checked(images)[0].get() is None
    assert "nan" in checked(images.at[0, 0, 0, 0].set(jnp.nan))[0].get()
