"""Steps whose batch normalisations see halves of a batch, on all devices and on one of them.

``python -m tests.support.grouped_run RESULT.npz`` keeps what came of them, and the programs.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from resnet_flax.machine.devices import data_mesh, replicate, replicated, split_batch
from resnet_flax.machine.runtime import add_flag, configure_runtime
from resnet_flax.nn.ops.platform import traced_for
from resnet_flax.training.metrics import Metrics
from resnet_flax.training.step import Images, create_train_state, train_steps
from tests.support.small_run import IMAGE_SIZE, MODEL, SGD, random_data

BATCH, STEPS = 16, 3


def run(mesh: Mesh) -> tuple[list[np.ndarray], str]:
    """Everything that three steps change, and the program of one."""
    data = random_data(BATCH * STEPS)
    model = MODEL.clone(dtype=np.float64, param_dtype=np.float64, normalization_groups=2)
    state = replicate(create_train_state(model, SGD, data), mesh)
    data = Images.place(*map(np.asarray, data), mesh)
    reached = state, replicate(Metrics.empty(), mesh)
    count = replicate(np.int32(1), mesh)
    batches = np.arange(BATCH * STEPS, dtype=np.int32).reshape(STEPS, 1, BATCH)
    steps = jax.jit(partial(train_steps, image_size=IMAGE_SIZE), out_shardings=replicated(mesh))
    program = steps.lower(*reached, data, split_batch(batches[0], mesh), count).compile()
    for batch in batches:
        reached = program(*reached, data, split_batch(batch, mesh), count)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(reached)], program.as_text()


def main(result: Path) -> None:
    configure_runtime()
    add_flag("--xla_backend_optimization_level=0")  # as in most tests: compiled sooner
    jax.config.update("jax_enable_x64", True)
    kept = {}
    one = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    for name, platform in (("cpu", "cpu"), ("accelerator", "gpu")):
        with traced_for(platform):
            (expected, _), (found, program) = run(one), run(data_mesh())
        kept[f"{name} program"] = np.array(program)
        for number, pair in enumerate(zip(found, expected, strict=True)):
            kept[f"{name} leaf {number}"] = np.stack(pair)
    np.savez(result, **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
