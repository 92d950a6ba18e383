import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from resnet_flax.training.compilation import TrainPrograms, compile_train_steps
from resnet_flax.training.metrics import Metrics
from tests.support.small_run import IMAGE_SIZE, STEPS, new_state, random_data


def test_the_programs_of_all_shapes_are_the_steps_and_the_first_waits_for_no_other():
    data, optimizer = random_data(12), optax.sgd(0.05)
    batches = [jnp.arange(8)[None], jnp.arange(8, 12)[None], jnp.arange(8)[None]]
    expected = new_state(data, optimizer), Metrics.empty()
    for batch in batches:
        expected = STEPS(*expected, data, batch)

    state = new_state(data, optimizer)
    steps = compile_train_steps(state, data, [(1, 8), (1, 4)], image_size=IMAGE_SIZE)
    lowered, lower = [], steps._lower
    steps._lower = lambda shape: lowered.append(shape) or lower(shape)
    found = state, Metrics.empty()
    assert lowered == []
    for batch in batches:
        found = steps(*found, data, batch)
        assert lowered == [(1, 4)]
    steps.background.shutdown()
    chex.assert_trees_all_equal(found, expected)


def test_an_accelerator_has_all_programs_before_its_first_step(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")
    compiled = []

    class Lowered:
        def __init__(self, shape):
            self.shape = shape

        def compile(self):
            if self.shape == (1, 3):
                raise RuntimeError("too large for the device")
            compiled.append(self.shape)

    TrainPrograms(Lowered, [(1, 8), (1, 4), (1, 2)])
    assert sorted(compiled) == [(1, 2), (1, 4), (1, 8)]
    with pytest.raises(RuntimeError, match="too large for the device"):
        TrainPrograms(Lowered, [(1, 8), (1, 3)])
