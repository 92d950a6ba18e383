"""The comparison's own script runs, other libraries' where they are, and its table is counted."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.ease.__main__ import (
    LIBRARIES,
    PRETRAINED,
    count,
    count_all,
    make_given,
    make_pretrained,
    run,
)
from benchmarks.tables import RESULTS


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


@pytest.mark.slow
def test_the_three_tasks_by_name_run_here(tmp_path, hub):
    make_pretrained(tmp_path, hub)
    assert run("resnet_flax_pretrained", sys.executable, tmp_path) == "all run"


@pytest.mark.foreign
def test_the_three_tasks_by_name_run_in_timm(tmp_path, hub):
    make_pretrained(tmp_path, hub)
    assert run("timm_pretrained", sys.executable, tmp_path) == "all run"


def test_a_library_that_is_not_there_is_told(given, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    assert run("flaxmodels", sys.executable, given).startswith("0 run; then ModuleNotFoundError")


def test_the_documentation_shows_what_is_counted_and_was_run():
    assert all(len(count(library)) == 6 for library in LIBRARIES)
    assert all(len(count(library)) == 3 for library in PRETRAINED)
    for name, libraries in {"ease": LIBRARIES, "ease_pretrained": PRETRAINED}.items():
        table = count_all(libraries)
        kept = json.loads((RESULTS / f"{name}.json").read_text())
        assert (table.columns, table.rows) == (kept["columns"], kept["rows"])
        assert {each: ran["result"] for each, ran in kept["ran"].items()} == dict.fromkeys(
            libraries, "all run"
        )
