"""The examples are run as a reader would run them, on fewer images."""

import os
import re
import subprocess
import sys

import pytest

from examples import check_port
from tests.support.snippets import ROOT


def run_example(name: str, *flags: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_chapter(fashion_mnist):
    output = run_example("chapter", "--train-examples=128", "--test-examples=64")
    assert "Residual(3): (4, 6, 6, 3) -> (4, 6, 6, 3)\n" in output
    assert "Residual(6): (4, 6, 6, 3) -> (4, 3, 3, 6)\n" in output
    assert re.search(r"^total +11,178,378 +1,734,890,496$", output, re.M)
    assert re.search(r"^loss \d\.\d+, train acc 0\.\d+, test acc 0\.\d+$", output, re.M)


@pytest.mark.slow
def test_training_makes_features_worth_more(fashion_mnist):
    output = run_example("linear_probe", "--train-examples=4000", "--probe-examples=500")
    found = {name: float(value) for name, value in re.findall(r"^(\w+).* (0\.\d+)$", output, re.M)}
    assert found["random"] < found["trained"], output


@pytest.mark.parametrize(
    ("fault", "train", "layer", "cause"),
    [
        ("padding", False, "block_0/conv_a", "padding"),
        ("epsilon", False, "block_0/norm_a", "eps"),
        ("relu", False, "block_0", "between layers"),
        ("none", False, None, None),
        ("momentum", True, "block_0/norm_a", "BN momentum"),
        ("none", True, "block_0/norm_a", "biased variance"),
    ],
)
def test_the_fault_of_a_port_is_named(fault, train, layer, cause):
    found = check_port.check(fault, train)
    assert (found.first_diverging_layer, found.likely_cause) == (layer, cause)


def test_the_port_is_checked_by_the_program(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_port.py"])
    check_port.main()
    assert "\nFirst diverging layer: block_0/conv_a\n" in capsys.readouterr().out
