"""Ten steps an epoch in float64, on the devices of one process or of several, and what came of it.

``python -m tests.support.sharded_run RESULT.npz [COORDINATOR PROCESSES ID]``
"""

import sys
from pathlib import Path

import jax
import numpy as np
import optax

from resnet_flax.machine.devices import data_mesh, join_processes, replicate
from resnet_flax.machine.interruption import Interruption
from resnet_flax.machine.runtime import configure_runtime
from resnet_flax.runs.checkpoints import Checkpoints
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.run_folder import CHECKPOINTS, open_run, write_metrics
from resnet_flax.training.loop import fit
from resnet_flax.training.position import Position
from resnet_flax.training.progress import Progress
from resnet_flax.training.step import Images, TrainState, create_train_state
from tests.support.small_run import MODEL, new_job

EPOCHS = 2


def main(result: Path, *others: str) -> None:
    run = result.with_suffix(".run")
    config = TrainConfig(run_dir=run, resume=run.exists())
    configure_runtime()
    jax.config.update("jax_enable_x64", True)
    if others:
        coordinator, processes, number = others
        join_processes(coordinator, int(processes), int(number))
    mesh = data_mesh()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (150, 8, 8, 1), np.uint8)
    labels = generator.integers(0, 10, 150).astype(np.int32)
    data = Images.place(images, labels, mesh)
    # 16 images are shared by 2, 4 or 8 devices; of the last batch's 6, each device gets all.
    job = new_job(data, 16, epochs=EPOCHS, mesh=mesh)
    dtypes = {"dtype": np.float64, "param_dtype": np.float64}
    model = MODEL.clone(**dtypes)
    optimizer = optax.sgd(0.05, momentum=0.9)
    state = create_train_state(model, optimizer, Images.place(images, labels), 0)
    folder = open_run(config) if jax.process_index() == 0 else None
    with Checkpoints(folder / CHECKPOINTS if folder else None) as checkpoints:
        state, position = checkpoints.restore(state)

        def epoch_ended(state: TrainState, position: Position) -> None:
            checkpoints.save(state, position, position.results[-1].test_acc)
            if folder:
                write_metrics(folder, position.results)

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
    if folder:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        figures = [(row.loss, row.train_acc, row.test_acc) for row in position.results]
        np.savez(result, *leaves, np.array(figures), devices=jax.device_count())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
