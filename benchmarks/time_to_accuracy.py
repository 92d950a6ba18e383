"""Seconds from the start of the process to a test accuracy of 0.909, for three ways to get there.

0.909 is the mean of thirteen public runs of D2L's recipe. ``python -m benchmarks.time_to_accuracy``
runs ``train.py --recipe fast`` to its end with three seeds and notes when the first epoch passes
it. D2L's own recipe takes its ten epochs for it; those are extrapolated, here and in PyTorch, from
``--steps`` training steps and a sixth as many evaluated batches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tables import Table, output_flag
from benchmarks.throughput import CONTENDERS, ask, start

TARGET = 0.909
D2L_IMAGES = 10 * 60_000
TRAIN = Path(__file__).parents[1] / "train.py"


def run_fast(seed: int, epochs: int) -> tuple[float | None, float, float]:
    """Seconds to the target, if it is reached; seconds to the end; accuracy at the end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), "--recipe", "fast", "--epochs", str(epochs)]
        command += ["--seed", str(seed), "--run-dir", f"{folder}/run"]
        started, times = time.perf_counter(), []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("epoch"):
                    times.append(time.perf_counter() - started)
                    print(f"  {times[-1]:6.1f} s  {line}", end="", flush=True)
        ended = time.perf_counter() - started
        if process.returncode:
            sys.exit(f"train.py stopped with exit code {process.returncode}")
        rows = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        accuracies = [json.loads(row)["test_acc"] for row in rows]
    passed = (seconds for seconds, each in zip(times, accuracies, strict=True) if each >= TARGET)
    return next(passed, None), ended, accuracies[-1]


def main() -> None:
    """Prints the runs, and a table that it keeps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10, help="of the recipe fast")
    parser.add_argument("--steps", type=int, default=24, help="of D2L's recipe")
    output_flag(parser, "time_to_accuracy")
    options = parser.parse_args()

    d2l = argparse.Namespace(model="resnet18", batch_size=256, image_size=96)
    ten_epochs = {}
    for contender in (CONTENDERS[0], CONTENDERS[-1]):
        process = start(contender, d2l)
        ready = ask(process)["ready"]
        rate = ask(process, [options.steps, options.steps // 6])["both"]
        process.communicate()
        ten_epochs[contender.name] = ready + D2L_IMAGES / rate
        print(f"{contender.name}: {ten_epochs[contender.name]:.0f} s for ten epochs", flush=True)
    runs = [run_fast(seed, options.epochs) for seed in options.seeds]

    theirs = ten_epochs[CONTENDERS[-1].name]
    print()
    columns = ("PyTorch takes", "accuracy at the end", "seconds to the end")
    table = Table("", f"seconds to test accuracy {TARGET}", *columns)
    for name, seconds in ten_epochs.items():
        ratio = f"{theirs / seconds:.1f}x"
        table.add(f"d2l, {name} (extrapolated)", f"{seconds:.0f}", ratio, "", "")
    for seed, (reached, seconds, accuracy) in zip(options.seeds, runs, strict=True):
        when = (f"{reached:.0f}", f"{theirs / reached:.1f}x") if reached else ("never", "")
        table.add(f"fast, seed {seed}", *when, f"{accuracy:.3f}", f"{seconds:.0f}")
    accuracies = [accuracy for _, _, accuracy in runs]
    mean, low, high = statistics.mean(accuracies), min(accuracies), max(accuracies)
    print(f"\nfast, {options.epochs} epochs: {mean:.4f} mean, {low:.3f} to {high:.3f}")
    table.keep(options.output)


if __name__ == "__main__":
    main()
