"""`resnet_flax.train`: the whole job in one call, wherever Python runs."""

import asyncio
import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import resnet_flax
from resnet_flax.errors import InputError
from resnet_flax.runs import TrainConfig

# A last batch of one image: the last stage of this network still has 4x4 values to normalise.
SMALL = {"recipe": "fast", "epochs": 1, "train_examples": 65, "batch_size": 32, "test_examples": 32}


@pytest.fixture(autouse=True, scope="module")
def no_cache() -> Iterator[None]:
    """The user's own stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["resnet_flax.runs.train"], "keep_compiled_programs", lambda: None)
        yield


def trained(folder: Path) -> resnet_flax.Run:
    return resnet_flax.train(TrainConfig(**SMALL, run_dir=folder))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, fashion_mnist, no_cache) -> resnet_flax.Run:
    return trained(tmp_path_factory.mktemp("runs") / "first")


def test_it_returns_what_it_trained(first_run):
    model, variables, results, folder = first_run
    assert [row.epoch for row in results] == [1]
    read, same = resnet_flax.from_pretrained(folder)
    images = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_array_equal(logits, jax.jit(read.apply)(same, images))


def test_in_a_thread_with_a_running_event_loop_it_does_the_same_and_touches_no_signal(
    first_run, tmp_path
):
    async def cell() -> resnet_flax.Run:  # as in a notebook
        return trained(tmp_path / "run")

    before, found = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(cell())))
    thread.start()
    thread.join()
    weights = [(run.folder / "model.safetensors").read_bytes() for run in (first_run, found[0])]
    assert weights[0] == weights[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_it_goes_on_with_the_fields_of_its_run(first_run, tmp_path):
    folder = shutil.copytree(first_run.folder, tmp_path / "run")
    again = resnet_flax.train(TrainConfig(resume=True, run_dir=folder))
    assert again.results == first_run.results
    with pytest.raises(InputError, match="whose run differs: `train_examples` 65 there, 128 here"):
        resnet_flax.train(TrainConfig(resume=True, run_dir=folder, train_examples=128))
    content = json.loads((folder / "config.json").read_text())
    assert (content["recipe"], content["epochs"], content["train_examples"]) == ("fast", 1, 65)
