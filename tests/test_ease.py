"""The comparison's own script runs, other libraries' where they are, and its table is counted."""

import sys
from pathlib import Path

import pytest

from benchmarks.ease.__main__ import LIBRARIES, count, make_given, run, table
from tests.support.snippets import ROOT


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    make_given(folder)
    return folder


@pytest.mark.slow
def test_the_six_tasks_run_here(given):
    assert run("resnet_flax", sys.executable, given) == "all run"


@pytest.mark.foreign
def test_the_six_tasks_run_in_timm(given):
    assert run("timm", sys.executable, given) == "all run"


def test_a_library_that_is_not_there_is_told(given, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    assert run("flaxmodels", sys.executable, given).startswith("0 run; then ModuleNotFoundError")


def test_the_documentation_shows_what_is_counted():
    assert all(len(count(library)) == 6 for library in LIBRARIES)
    assert table() in (ROOT / "docs" / "comparison.md").read_text()
