"""Whether the tests would notice: twelve faults, planted one at a time in a copy of the code.

``python -m benchmarks.mutations`` takes a few minutes and prints for each fault which test failed.
It exits with 0 only if the copy passes without a fault and fails with each. A fault is an exact
replacement of text: where that text is not found exactly once, the script stops.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
COPIED = ("resnet_flax", "tests", "pyproject.toml")


class Fault(NamedTuple):
    """One fault and the tests that should notice.

    Attributes:
        name: as in the table.
        file: of the package.
        old: text in the file, exactly once.
        new: what replaces it.
        tests: node ids, the first to fail is reported.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def parity(level: str, case: str) -> tuple[str, ...]:
    """A test of tests/nn/test_parity.py in float64."""
    return (f"tests/nn/test_parity.py::test_{level}[{case}-float64]",)


FAULTS = (
    Fault(
        "SAME padding",
        "nn/layers.py",
        "        y = convolve(x, kernel, self.strides, self.padding, self.dilation)\n",
        "        strides = (self.strides, self.strides)\n"
        '        axes = ("NHWC", "HWIO", "NHWC")\n'
        '        y = lax.conv_general_dilated(x, kernel, strides, "SAME", None, None, axes)\n',
        parity("a_eval_forward", "Residual-d2l-stride2-28px-batch2"),
    ),
    Fault(
        "BN momentum 0.99",
        "nn/layers.py",
        "momentum: float = 0.1\n",
        "momentum: float = 0.01  # what Flax calls 0.99\n",
        parity("d_running_statistics", "Residual-d2l-27px-batch1"),
    ),
    Fault(
        "eps 1e-3",
        "nn/layers.py",
        "epsilon: float = 1e-5\n",
        "epsilon: float = 1e-3\n",
        parity("a_eval_forward", "Residual-d2l-27px-batch1"),
    ),
    Fault(
        "biased variance",
        "nn/layers.py",
        "unbiased_var = var * (count / (count - 1))",
        "unbiased_var = var",
        parity("d_running_statistics", "Residual-d2l-27px-batch1"),
    ),
    Fault(
        "swapped stride placement",
        "nn/blocks.py",
        "(self.strides, 1) if self.stride_first else (1, self.strides)",
        "(1, self.strides) if self.stride_first else (self.strides, 1)",
        parity("a_eval_forward", "Bottleneck-torchvision-stride2-28px-batch2"),
    ),
    Fault(
        "missing bias",
        "nn/layers.py",
        "y = add_bias(y, bias, centred)",
        "y = add_bias(y, 0 * bias, centred)",
        parity("a_eval_forward", "Residual-d2l-27px-batch1"),
    ),
    Fault(
        "transposed kernel",
        "weights/state_dict.py",
        "4: (2, 3, 1, 0)",
        "4: (3, 2, 1, 0)",
        parity("a_eval_forward", "Residual-d2l-27px-batch1"),
    ),
    Fault(
        "last batch dropped",
        "data/dataset.py",
        "range(batch_size, num_examples, batch_size))",
        "range(batch_size, num_examples, batch_size))[: num_examples // batch_size]",
        ("tests/data/test_dataset.py::test_batches_hold_every_index_once_and_the_last_is_kept",),
    ),
    Fault(
        "mean over batches, not samples",
        "training/metrics.py",
        "(losses * weights).sum(),\n"
        "            correct=self.correct + correct.sum(dtype=jnp.int32),\n"
        "            count=self.count + (weights > 0).sum(dtype=jnp.int32),\n",
        # As if each batch, padded or not, were a full one.
        "(losses * weights).sum() * weights.size / weights.sum(),\n"
        "            correct=self.correct + correct.sum() * weights.size // (weights > 0).sum(),\n"
        "            count=self.count + weights.size,\n",
        (
            "tests/training/test_step.py::test_evaluation_weighs_by_sample_whatever_the_batch_size[4]",
        ),
    ),
    Fault(
        "wrong resize alignment",
        "nn/preprocessing.py",
        "centres = (np.arange(new) + 0.5) * scale",
        "centres = np.arange(new) * scale + 0.5",
        parity("e_training_steps_of_the_library", "resnet18-d2l-channels=8-plain-batch4"),
    ),
    Fault(
        "ReLU before add",
        "nn/blocks.py",
        "        y = normalized(conv2, bn2, self.dropout(y, train), train)\n"
        "        return nn.relu(self.add(self.shortcut(x, train), y, train))",
        "        y = normalized(conv2, bn2, self.dropout(y, train), train)\n"
        "        return self.add(self.shortcut(x, train), nn.relu(y), train)",
        parity("a_eval_forward", "Residual-d2l-27px-batch1"),
    ),
    Fault(
        "no shortcut norm",
        "nn/blocks.py",
        '        return normalized(conv, self.norm(name=f"{number + 1}"), x, train)',
        '        x = conv(x)\n        self.norm(name=f"{number + 1}")(x, train)\n        return x',
        parity("a_eval_forward", "Residual-torchvision-stride2-33px-batch2"),
    ),
)


def plant(fault: Fault, copy: Path) -> None:
    """Replaces the text in the copy."""
    path = copy / "resnet_flax" / fault.file
    source = path.read_text()
    if source.count(fault.old) != 1:
        sys.exit(f"{fault.name}: found {source.count(fault.old)} times in {fault.file}, not once")
    path.write_text(source.replace(fault.old, fault.new))


def run_tests(fault: Fault | None) -> subprocess.CompletedProcess[str]:
    """Runs the fault's tests, or all faults' tests without any fault, on a fresh copy."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (REPOSITORY / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(REPOSITORY / name, copy / name, ignore=ignored)
            else:
                shutil.copy(REPOSITORY / name, copy / name)
        tests = fault.tests if fault else tuple(test for each in FAULTS for test in each.tests)
        if fault:
            plant(fault, copy)
        options = ["-n0", "-x", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *dict.fromkeys(tests)]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)


def main() -> None:
    """Prints the table."""
    print(f"{'fault':<32}{'seconds':>8}  caught by")
    caught = 0
    for fault in (None, *FAULTS):
        start = time.perf_counter()
        result = run_tests(fault)
        seconds = f"{time.perf_counter() - start:8.0f}"
        if fault is None:
            if result.returncode != 0:
                sys.exit(f"without a fault, the tests fail:\n{result.stdout}{result.stderr}")
            print(f"{'none':<32}{seconds}  -", flush=True)
            continue
        # A fault that breaks the import would exit with another code, and prove nothing.
        failed = re.search(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
        noticed = result.returncode == 1 and failed
        caught += bool(noticed)
        test = failed[1] if noticed and failed else f"NOTHING (exit {result.returncode})"
        print(f"{fault.name:<32}{seconds}  {test.removeprefix('tests/')}", flush=True)
    print(f"{caught} of {len(FAULTS)} faults caught")
    sys.exit(caught != len(FAULTS))


if __name__ == "__main__":
    main()
