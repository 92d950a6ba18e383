import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_flax import Bottleneck, ResNet
from resnet_flax.nn.preprocessing import augment
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.recipes import RECIPES, build_optimizer, freeze
from resnet_flax.training.step import eval_step, moving_average, train_step
from resnet_flax.weights import variable_shapes
from tests.support.small_run import IMAGE_SIZE, new_state, random_data

FAST, D2L, FINETUNE, IMAGENET = (RECIPES[n] for n in ("fast", "d2l", "finetune", "imagenet"))


def images(count: int = 64) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 1, (count, 8, 8, 1)).astype(np.float32)


def test_d2l_does_not_touch_the_images():
    before = images()
    names = ("random_resized_crop", "shift", "flip", "erase")
    options = {name: getattr(D2L, name) for name in names}
    np.testing.assert_array_equal(augment(jax.random.key(0), before, **options), before)


def test_each_image_is_a_shifted_and_perhaps_mirrored_copy():
    before = images()
    recipe = dataclasses.replace(FAST, shift=1, flip=True)
    after = np.asarray(
        jax.jit(lambda key, x: augment(key, x, shift=recipe.shift, flip=recipe.flip))(
            jax.random.key(0), before
        )
    )
    seen = set()
    for old, new in zip(before, after, strict=True):
        candidates = {
            (mirrored, down, right): np.pad(view, ((1, 1), (1, 1), (0, 0)))[down:, right:][:8, :8]
            for mirrored, view in ((False, old), (True, old[:, ::-1]))
            for down in range(3)
            for right in range(3)
        }
        found = [key for key, image in candidates.items() if np.array_equal(image, new)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 12  # of 18


def erased(share: float, before: np.ndarray) -> np.ndarray:
    """Where erasing, after a shift and a mirror image, changed something: (N, H, W, C)."""

    @jax.jit
    def both(key, x):
        options = {"shift": 1, "flip": True}
        return augment(key, x, **options), augment(key, x, erase=share, **options)

    kept, after = map(np.asarray, both(jax.random.key(0), before))
    changed = kept != after
    noise = after[changed]
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert noise.mean() == pytest.approx(0.5, abs=0.02)
    assert noise.std() == pytest.approx(12**-0.5, abs=0.02)
    return changed


def test_what_is_erased_is_a_rectangle_of_noise_within_the_bounds():
    height, width = 12, 20
    before = np.full((500, height, width, 3), -1, np.float32)  # noise is never as dark
    changed = erased(1.0, before)
    np.testing.assert_array_equal(changed.all(-1), changed.any(-1))
    rows, columns = changed.any((2, 3)), changed.any((1, 3))
    np.testing.assert_array_equal(changed[..., 0], rows[:, :, None] & columns[:, None])
    for line in (rows, columns):  # one piece
        assert (np.diff(line, prepend=False, append=False, axis=1).sum(1) == 2).all()
        assert line.any(0).all()
        assert line[:, 0].mean() == pytest.approx(line[:, -1].mean(), abs=0.1)
    h, w = rows.sum(1), columns.sum(1)
    assert ((h + 0.5) * (w + 0.5) >= 0.02 * height * width).all()  # sides are rounded
    assert ((h - 0.5) * (w - 0.5) <= 0.4 * height * width).all()
    assert ((h - 0.5) / (w + 0.5) <= 1 / 0.3).all()
    assert ((h + 0.5) / (w - 0.5) >= 0.3).all()
    assert np.mean(h * w) / (height * width) == pytest.approx(0.2, abs=0.03)
    assert np.mean(h > w) == pytest.approx(0.5, abs=0.1)


def test_a_share_of_the_images_is_erased_and_the_others_keep_their_bits():
    changed = erased(0.5, images(1000))
    assert changed.any((1, 2, 3)).mean() == pytest.approx(0.5, abs=0.06)


def test_one_cycle_rises_and_falls_to_nearly_nothing():
    optimizer = build_optimizer(dataclasses.replace(FAST, adam_share=1.0), 1.0, 100)
    params, gradient = {"bias": jnp.zeros(2)}, {"bias": -jnp.ones(2)}
    state, rates = optimizer.init(params), []
    for _ in range(100):
        # With a constant gradient, Adam's updates are as large as its rate.
        updates, state = optimizer.update(gradient, state, params)
        rates.append(float(updates["bias"][0]))
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1, rel=1e-2)
    assert rates.index(max(rates)) == 20
    assert rates[-1] < 1e-3


def test_finetune_is_nesterovs_momentum_in_one_cycle():
    optimizer = build_optimizer(FINETUNE, 1.0, 100)
    params, gradient = {"bias": jnp.zeros(2)}, {"bias": -jnp.ones(2)}
    state, mean, rates = optimizer.init(params), 0.0, []
    update = jax.jit(optimizer.update)
    for _ in range(100):
        updates, state = update(gradient, state)
        mean = 1 + FINETUNE.momentum * mean
        rates.append(float(updates["bias"][0]) / (1 + FINETUNE.momentum * mean))
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1, rel=1e-5)
    assert rates.index(max(rates)) == 20
    assert rates[-1] < 1e-3


def test_imagenet_warms_up_by_step_for_five_of_ninety_epochs_and_falls_to_nothing():
    optimizer = build_optimizer(dataclasses.replace(IMAGENET, momentum=0.0), 0.4, 180)
    params, gradient = {"bias": jnp.zeros(2)}, {"bias": -jnp.ones(2)}
    state, rates = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(180):
        updates, state = update(gradient, state, params)
        rates.append(float(updates["bias"][0]))
    np.testing.assert_allclose(rates[:11], np.linspace(0.004, 0.4, 11), rtol=1e-5)
    cosine = 0.2 * (1 + np.cos(np.pi * np.arange(170) / 170))
    np.testing.assert_allclose(rates[10:], cosine, rtol=1e-5, atol=1e-7)


def test_imagenet_decays_kernels_alone_and_before_the_momentum():
    model = ResNet((1,), Bottleneck, channels=8, frozen_stages=1)
    shapes = unflatten_dict(variable_shapes(model, 1))["params"]
    params = jax.tree.map(lambda spec: jnp.ones(spec.shape), shapes)
    optimizer = freeze(build_optimizer(dataclasses.replace(IMAGENET, warm_up=0.0), 0.1, 1), model)
    updates, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
    found = {path: {*np.ravel(leaf).tolist()} for path, leaf in flatten_dict(updates).items()}
    moved = {path for path, values in found.items() if values != {0.0}}
    assert moved == {path for path in found if path[-1] == "kernel" and path[0] != "conv1"}
    assert [*set.union(*map(found.get, moved))] == [pytest.approx(-0.1 * 1e-4)]

    optimizer = build_optimizer(dataclasses.replace(IMAGENET, warm_up=0.0), 0.1, 10**6)
    params, gradient = {"kernel": jnp.ones((1, 1))}, {"kernel": jnp.zeros((1, 1))}
    state = optimizer.init(params)
    for share in (1, 1.9, 2.71):  # 1 + 0.9 * the last
        updates, state = optimizer.update(gradient, state, params)
        assert float(updates["kernel"][0, 0]) == pytest.approx(-0.1 * 1e-4 * share)


def test_finetune_crops_and_mirrors_to_train_and_is_scored_plainly():
    options = FINETUNE.step_options()
    assert options["random_resized_crop"] > 0
    assert options["flip"]
    assert not FINETUNE.flip_test
    assert {name for name, recipe in RECIPES.items() if recipe.flip_test} == {"fast", "best"}

    # The step does it.
    data = random_data(8)
    state = jax.eval_shape(lambda: new_state(data))
    step = partial(train_step.lower, state, Metrics.empty(), *data, image_size=IMAGE_SIZE)
    plain = {"random_resized_crop": 0.0}
    assert step(**options).as_text() != step(**options | plain).as_text()


def test_muon_turns_a_kernel_in_all_directions_alike():
    optimizer = build_optimizer(dataclasses.replace(FAST, weight_decay=0.0), 1.0, 100)
    params = {"kernel": jnp.zeros((3, 3, 2, 4))}
    gradient = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)) * jnp.arange(4)}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    lengths = jnp.linalg.svd(updates["kernel"].reshape(18, 4), compute_uv=False)
    # Newton and Schulz' iteration is stopped early.
    np.testing.assert_allclose(lengths[:3] / lengths[0], 1, atol=0.5)
    assert float(lengths[3]) < 1e-3 * float(lengths[0])  # the gradient has no such direction


def test_decay_spares_biases_and_batch_normalisation():
    optimizer = build_optimizer(dataclasses.replace(FAST, weight_decay=0.1), 1.0, 100)
    params = {"kernel": jnp.ones((3, 3, 2, 4)), "scale": jnp.ones(2)}
    updates, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
    assert float(updates["scale"].sum()) == 0
    assert float(updates["kernel"].sum()) < 0


def test_the_average_follows_and_is_evaluated():
    assert float(moving_average(FAST.average_decay, 0.0, 1.0, jnp.int32(0))) == pytest.approx(0.9)
    assert float(moving_average(FAST.average_decay, 0.0, 1.0, jnp.int32(10**6))) == pytest.approx(
        1 - FAST.average_decay, rel=1e-3
    )
    data = random_data(8)
    state = new_state(data, build_optimizer(FAST, 0.1, 4), average=True)
    options = FAST.step_options()
    for _ in range(2):
        state, _ = train_step(state, Metrics.empty(), *data, image_size=IMAGE_SIZE, **options)
    assert state.variables is state.average
    average, newest = state.average["params"]["fc"]["kernel"], state.params["fc"]["kernel"]
    assert bool((average != newest).any())


def test_flip_averaging_does_not_tell_an_image_from_its_mirror_image():
    data = random_data(8)
    mirrored = data._replace(images=data.images[:, :, ::-1])
    state = new_state(data, average=True)
    weights = np.ones(8, np.float32)

    def loss(data, flip):
        options = {"image_size": IMAGE_SIZE, "flip": flip}
        return eval_step(state, Metrics.empty(), *data, weights, **options).loss

    assert loss(data, True) == pytest.approx(loss(mirrored, True), rel=1e-6)
    assert loss(data, False) != pytest.approx(loss(mirrored, False), rel=1e-6)
