"""Ten steps an epoch in float64, on the devices of one process or of several, and what came of it.

``python -m tests.support.sharded_run RESULT.npz FOLDER [COORDINATOR PROCESSES ID]`` streams the
images of a folder by class, or holds random ones in memory if it is ``-``.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather

from resnet_flax.data import load_dataset
from resnet_flax.machine.devices import data_mesh, join_processes, replicate
from resnet_flax.machine.interruption import Interruption
from resnet_flax.machine.runtime import configure_runtime
from resnet_flax.runs.checkpoints import Checkpoints
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.run_folder import CHECKPOINTS, open_run, write_metrics
from resnet_flax.runs.train import feed_of
from resnet_flax.training.feed import Call, Feed
from resnet_flax.training.loop import fit
from resnet_flax.training.position import Position
from resnet_flax.training.progress import Progress
from resnet_flax.training.step import Images, TrainState, create_train_state
from tests.support.small_run import MODEL, new_job

EPOCHS = 2


class Watched:
    """A feed whose global batches are noted."""

    def __init__(self, feed: Feed, seen: list[str]) -> None:
        self.feed, self.seen = feed, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feed, name)

    def train(self, *position: Any) -> Iterator[Call]:
        for call in self.feed.train(*position):
            self._note(call.arguments)
            yield call

    def test(self) -> Iterator[Any]:
        for arguments in self.feed.test():
            self._note(arguments)
            yield arguments

    def _note(self, arguments: Any) -> None:
        whole = (np.asarray(process_allgather(array, tiled=True)) for array in arguments)
        self.seen.append(hashlib.sha256(b"".join(array.tobytes() for array in whole)).hexdigest())


def main(result: Path, folder: str, *others: str) -> None:
    run = result.with_suffix(".run")
    config = TrainConfig(
        run_dir=run, resume=run.exists(), epochs=EPOCHS, batch_size=16, recipe="finetune", workers=0
    )
    configure_runtime()
    jax.config.update("jax_enable_x64", True)
    if others:
        coordinator, processes, number = others
        join_processes(coordinator, int(processes), int(number))
    mesh = data_mesh()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (150, 8, 8, 1), np.uint8)
    labels = generator.integers(0, 10, 150).astype(np.int32)
    # 16 images are shared by 2, 4 or 8 devices; of the last batch's 6, each device gets all.
    job = new_job(Images.place(images, labels, mesh), 16, epochs=EPOCHS, mesh=mesh)
    seen: list[str] = []
    if folder != "-":
        data = load_dataset(f"folder:{folder}", image_size=8, stream_above=0)
        images, labels = data.train.images, data.train.labels
        job = job._replace(feed=Watched(feed_of(config, data, mesh), seen))
    dtypes = {"dtype": np.float64, "param_dtype": np.float64}
    model = MODEL.clone(**dtypes)
    optimizer = optax.sgd(0.05, momentum=0.9)
    state = create_train_state(model, optimizer, (images, labels), 0)
    kept = open_run(config) if jax.process_index() == 0 else None
    with Checkpoints(kept / CHECKPOINTS if kept else None) as checkpoints:
        state, position = checkpoints.restore(state)

        def epoch_ended(state: TrainState, position: Position) -> None:
            checkpoints.save(state, position, position.results[-1].test_acc)
            if kept:
                write_metrics(kept, position.results)

        state, position = fit(
            job,
            replicate(state, mesh),
            position,
            progress=Progress(EPOCHS, 8),
            save=checkpoints.save,
            epoch_ended=epoch_ended,
            interruption=Interruption(),
        )
    assert int(state.step) == 10 * EPOCHS
    if kept:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        figures = [(row.loss, row.train_acc, row.test_acc) for row in position.results]
        devices = jax.device_count()
        np.savez(result, *leaves, np.array(figures), seen=np.array(seen), devices=devices)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
