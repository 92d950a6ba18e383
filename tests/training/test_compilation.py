import threading
import time
from functools import partial

import chex
import jax.numpy as jnp
import optax
import pytest

from resnet_flax.machine.devices import data_mesh
from resnet_flax.training.compilation import EVALUATION, Programs, compile_programs
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.step import eval_by_index
from tests.support.small_run import IMAGE_SIZE, feed_of, new_state, random_data, steps


def test_the_programs_are_the_steps_and_the_evaluation():
    data, optimizer = random_data(12), optax.sgd(0.05)
    batches = [jnp.arange(8)[None], jnp.arange(8, 12)[None], jnp.arange(8)[None]]
    expected = new_state(data, optimizer), Metrics.empty()
    for batch in batches:
        expected = steps(*expected, data, batch, 1)

    programs = compile_programs(
        new_state(data, optimizer),
        feed_of(data, 8),
        0,
        mesh=data_mesh(),
        step_options={"image_size": IMAGE_SIZE},
        eval_options={"image_size": IMAGE_SIZE},
    )
    found = new_state(data, optimizer), Metrics.empty()
    for batch in batches:
        found = programs(batch.shape, *found, data, batch, jnp.int32(1))
    chex.assert_trees_all_equal(found, expected)
    test = Metrics.empty(), data, jnp.arange(8), jnp.ones(8)
    chex.assert_trees_all_close(
        programs(EVALUATION, found[0], *test),
        eval_by_index(expected[0], *test, image_size=IMAGE_SIZE),
        rtol=1e-6,
    )
    with programs:
        pass  # waits for the last


class Lowered:
    """A program that notes when it is compiled."""

    def __init__(self, name, compiled):
        self.name, self.compiled = name, compiled

    def compile(self):
        if self.name == "refused":
            raise RuntimeError("too large for the device")
        self.compiled.append((self.name, threading.current_thread()))
        return lambda: self.name


def test_the_first_is_ready_and_the_others_follow_one_by_one():
    compiled = []
    names = ["first", "second", "third"]
    lower = {name: lambda name=name: Lowered(name, compiled) for name in names}
    programs = Programs(lower)
    assert compiled == [("first", threading.main_thread())]
    assert programs("first") == "first"
    assert programs("third") == "third"
    assert [name for name, _ in compiled] == names
    assert len({thread for _, thread in compiled[1:]}) == 1  # which does one after the other


def test_nothing_more_is_compiled_for_a_run_that_is_asked_to_stop():
    compiled = []
    lower = {name: lambda name=name: Lowered(name, compiled) for name in ("first", "second")}
    with Programs(lower, wanted=lambda: False) as programs:
        assert programs("first") == "first"
    assert [name for name, _ in compiled] == ["first"]


def test_a_wait_for_the_compiler_is_counted():
    class Slow(Lowered):
        def compile(self):
            time.sleep(0.2)
            return super().compile()

    names = ["first", "second", "third"]
    with Programs({name: partial(Slow, name, []) for name in names}) as programs:
        programs("first")
        assert programs.waited == 0
        programs("third")
        assert programs.waited > 0.2
        waited = programs.waited
        programs("second")
        programs("third")
        assert programs.waited < waited + 0.2


def test_a_program_that_the_compiler_refuses_is_an_error_where_it_is_called():
    with pytest.raises(RuntimeError, match="too large for the device"):
        Programs({"refused": lambda: Lowered("refused", [])})
    lower = {name: lambda name=name: Lowered(name, []) for name in ("first", "refused")}
    programs = Programs(lower)
    assert programs("first") == "first"
    with pytest.raises(RuntimeError, match="too large for the device"):
        programs("refused")
