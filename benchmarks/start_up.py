"""Seconds from the start of ``train.py`` to its first training step.

``python -m benchmarks.start_up`` starts each recipe with an empty cache of compiled programs, and
then again and again with what the first start left there. The data must have been prepared, as any
run does it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tables import Table, output_flag

TRAIN = Path(__file__).parents[1] / "train.py"
READY = "compiled in "  # what it says when it begins to train


def time_start(recipe: str, cache: str) -> float:
    """Starts a run, kills it when it trains, and returns the seconds it took to get there."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), "--recipe", recipe, "--run-dir", f"{folder}/run"]
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        started = time.perf_counter()
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stderr
            for line in process.stderr:
                if line.startswith(READY):
                    seconds = time.perf_counter() - started
                    process.kill()
                    return seconds
        sys.exit(f"train.py stopped with exit code {process.returncode}")


def main() -> None:
    """Prints the table and keeps it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["d2l", "fast"])
    parser.add_argument("--repeat", type=int, default=7)
    output_flag(parser, "start_up")
    options = parser.parse_args()
    table = Table("recipe", "first start, s", "later starts, s (median, range)")
    for recipe in options.recipes:
        with tempfile.TemporaryDirectory() as cache:
            first = time_start(recipe, cache)
            later = [time_start(recipe, cache) for _ in range(options.repeat)]
        median = statistics.median(later)
        spread = f"{median:.1f} ({min(later):.1f}-{max(later):.1f})"
        table.add(recipe, f"{first:.1f}", spread)
    table.keep(options.output)


if __name__ == "__main__":
    main()
