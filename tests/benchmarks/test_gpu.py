"""`benchmarks.gpu`, as far as a machine without a GPU can tell."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import TABLES, job_table, kernels_table, throughput_table
from benchmarks.tables import RESULTS
from tests.support.snippets import ROOT

CASE = {"model": "resnet18", "dtype": "float32", "batch": 8, "size": 32, "contender": "plain Flax"}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks.gpu: no GPU that JAX can use")


def test_what_is_left_out_or_failed_stands_in_the_table() -> None:
    left_out = {**CASE, "left_out": "no time left"}
    other = {**CASE, "dtype": "bfloat16", "contender": "resnet_flax"}
    measured = {**other, "images_per_second": 1234, "range": [999, 2000]}
    table = throughput_table([left_out, measured])
    assert table.columns == ["images/s", "resnet18, 8 of 32x32, float32", table.columns[2]]
    assert table.rows == [
        ["plain Flax", "no time left", ""],
        ["resnet_flax", "", "1,234 (999-2,000)"],
    ]
    assert kernels_table([left_out]).rows == [["all", "no time left"]]
    failed = {"job": "cold", "parts": {"compile": 2.0}, "seconds": 9.0, "exit_code": 1}
    assert job_table([failed]).rows == [["cold, failed with exit code 1", "2.0", "9.0"]]


def test_a_job_that_hangs_is_killed_and_one_that_xla_ends_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("""
import os, sys, time
print("compiling the training step ...", flush=True)
if "warm" in " ".join(sys.argv):
    time.sleep(60)
print("F1126 22:54 triton.cc:703] Check failed: 144 vs. 24", *range(40), sep="\\n", flush=True)
os.abort()
""")
    monkeypatch.setattr(gpu, "JOB_SECONDS", 10)
    cold, warm = gpu.run_job(1, True, time.perf_counter() + 60)
    assert cold["exit_code"] == -signal.SIGABRT
    assert cold["ends_with"][0].endswith("Check failed: 144 vs. 24")
    assert warm["exit_code"] == -signal.SIGKILL
    assert "start" in warm["parts"]


@pytest.mark.parametrize("section", ["throughput", "kernels"])
def test_the_kept_tables_are_made_of_what_was_measured(section: str) -> None:
    name, as_table = TABLES[section]
    kept = json.loads((RESULTS / f"{name}.json").read_text())
    table = as_table(kept["measured"])
    assert (table.columns, table.rows) == (kept["columns"], kept["rows"])


def test_the_readme_says_what_is_kept() -> None:
    readme = (ROOT / "README.md").read_text()
    measured = json.loads((RESULTS / "gpu.json").read_text())["measured"]
    rates = [row["images_per_second"] for row in measured if "range" in row]
    assert len(rates) == 6
    for rate in rates:
        assert f"| {rate:,} (" in readme


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    done = run("--tiny", "--only", "throughput", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (output,) = tmp_path.iterdir()
    kept = json.loads(output.read_text())
    (row,) = kept["measured"]
    assert row["images_per_second"] > 0
    assert "range" in row
    assert {"machine", "commit", "versions", "rows"} <= kept.keys()
