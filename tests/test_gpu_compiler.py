"""``pytest -m gpu_compiler``: a GPU's compiler takes the programs of a run, on any machine.

It fails checks of its own in places, and then ends the process: so each network has one.
"""

import subprocess
import sys

import pytest

from tests.support.snippets import ROOT


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("network", "image_size"),
    [
        (("resnet18", "d2l"), 96),
        (("resnet50", "d2l"), 96),
        (("resnet14", "torchvision"), 28),
        (("resnet18", "torchvision"), 224),
        (("resnet50d", "torchvision"), 224),
        (("resnext50_32x4d", "torchvision"), 224),
    ],
    ids=str,
)
def test_the_programs_of_a_run_compile(
    network: tuple[str, str], image_size: int, dtype: str
) -> None:
    command = [sys.executable, "-m", "tests.support.compile_for_gpu"]
    command += [*network, f"{image_size}", dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-2] == "evaluation"
