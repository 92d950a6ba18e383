"""`benchmarks.gpu`, as far as a machine without a GPU can tell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import as_tables
from tests.support.snippets import ROOT

ABOUT = {"device": "GPU", "commit": "abc", "versions": {"jax": "1"}}
CASE = {"model": "resnet18", "dtype": "float32", "batch": 8, "size": 32, "contender": "plain Flax"}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks.gpu: no GPU that JAX can use")


def test_what_is_left_out_or_failed_stands_in_the_table() -> None:
    rows = [
        {**CASE, **ABOUT, "left_out": "no time left"},
        {**ABOUT, "job": "cold", "parts": {"compile": 2.0}, "seconds": 9.0, "exit_code": 1},
    ]
    text = as_tables(rows)
    assert "| resnet18, 8, 32, float32 | plain Flax | no time left |  |" in text
    assert "| cold, failed with exit code 1 | 2.0 | 9.0 |" in text


def test_the_kept_figures_are_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    lines = (ROOT / "benchmarks" / "results" / "gpu.json").read_text().splitlines()
    rates = [row["images_per_second"] for row in map(json.loads, lines) if "range" in row]
    assert len(rates) == 6
    for rate in rates:
        assert f" {rate:,} |" in readme


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = run("--tiny", "--only", "throughput", "--output", str(output))
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["images_per_second"] > 0
    assert {"device", "commit", "versions", "range"} <= row.keys()
