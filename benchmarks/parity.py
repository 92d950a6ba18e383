"""The largest difference from PyTorch at each of the five levels of `tests/support/parity.py`.

``python -m benchmarks.parity`` makes the README's table: for each module and dtype the norm of the
difference of the tensor that is furthest off, as a share of its layer's norm. Random images of
33x33 pixels in batches of 2; for SGD, 20 steps on batches of 8 images of Fashion-MNIST, at a rate
of 0.05. In whole networks float32, and in deep ones float64 too, steps of that size amplify any
rounding, PyTorch's own as well: there the rate is 1e-6, marked with a star.
"""

import argparse

import jax
import numpy as np
import torch

from benchmarks.tables import Table, output_flag
from resnet_flax.data import Dataset, load_fashion_mnist
from resnet_flax.machine.runtime import configure_runtime
from tests.support.parity import (
    BLOCKS,
    NETWORKS,
    OPTIMISERS,
    STAGES,
    Case,
    differences,
    sgd_differences,
)

LEVELS = {
    "eval": "(a) eval forward",
    "train": "(b) train forward",
    "gradients": "(c) gradients",
    "statistics": "(d) running statistics",
    "sgd": "(e) 20 SGD steps",
}
DTYPES = ("float64", "float32")
SHOWN = (
    "Residual-d2l-stride2",
    "Bottleneck-torchvision-stride2",
    "stage2-d2l",
    "resnet18-d2l",
    "resnet18-torchvision",
    "resnet50-torchvision",
)


def largest_differences(case: Case, dtype: str) -> dict[str, float]:
    """Level -> difference of the tensor that is furthest off."""
    data = load_fashion_mnist()[0].take(8 * 20)
    images = np.pad(data.images, ((0, 0), (2, 3), (2, 3), (0, 0)))
    steps = OPTIMISERS["tiny-steps" if amplifies(case, dtype) else "plain"]
    found = dict(differences(case, 33, 2, dtype))
    found["sgd"] = sgd_differences(case, steps, dtype, Dataset(images, data.labels), batch=8)
    return {level: max(found[level].values()) for level in LEVELS}


def amplifies(case: Case, dtype: str) -> bool:
    """Whether 20 steps of 0.05 make much of a rounding error."""
    return case in NETWORKS and (dtype == "float32" or "resnet18" not in case.name)


def main() -> None:
    """Prints the table and keeps it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output_flag(parser, "parity")
    options = parser.parse_args()

    configure_runtime()
    torch.set_num_threads(1)
    cases = {case.name: case for case in [*BLOCKS, *STAGES, *NETWORKS]}
    table = Table(f"jax {jax.__version__}, torch {torch.__version__}", *LEVELS.values())
    for name in SHOWN:
        for dtype in DTYPES:
            found = largest_differences(cases[name], dtype)
            figures = [f"{found[level]:.0e}" for level in LEVELS]
            figures[-1] += "*" if amplifies(cases[name], dtype) else ""
            table.add(f"{name}, {dtype}", *figures)
    table.keep(options.output)


if __name__ == "__main__":
    main()
