"""The figures of the pages are those of the kept files, and a benchmark keeps what it prints."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import PAGES, PLACES, RESULTS, Table, epochs_table, line, rendered
from tests.support.snippets import ROOT

FILES = sorted(RESULTS.glob("*.json"))
FIGURE = re.compile(r"\d\.\d|\d,\d{3}|\d[x%]|\de-\d|\| *\d+ *\|")
# Tables of words, which mention a number.
WORDS = ["| 2. train a step | `train_step`, for batches of bytes from any loader |"]


def name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_shows_what_is_kept(page):
    text = page.read_text()
    assert rendered(text) == text, "python -m benchmarks.tables renders it"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_other_table_has_figures(page):
    rows = re.findall(r"^\|.*$", PLACES.sub("", page.read_text()), re.M)
    typed = [row for row in rows if FIGURE.search(row) and not row.startswith(tuple(WORDS))]
    assert typed == []


@pytest.mark.parametrize("edited", ["6316", "1.17x (0.99-1.23)", "resnet_flax | 109.7", "4e-07"])
def test_an_edited_figure_is_noticed(edited):
    text = (ROOT / "README.md").read_text()
    assert text.count(edited)
    assert rendered(text.replace(edited, edited[:-1] + "0", 1)) == text


@pytest.mark.parametrize("row", ["| a | 0.91 |", "| a | 1.5x (1-2) |", "| a | 34 |", "| 2e-16 | |"])
def test_a_figure_is_known_as_one(row):
    assert FIGURE.search(row)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_tells_its_origin(path):
    kept = json.loads(path.read_text())
    for field in ("command", "machine", "versions"):
        assert kept[field], field
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"])
    assert re.match(r"[0-9a-f]{7}", kept["commit"])
    assert {len(row) for row in kept["rows"]} == {len(kept["columns"])}
    assert not re.search(r'[ ="]/', kept["command"]), "a path of somebody's machine"


def test_a_table_is_kept_as_it_was_printed(tmp_path, capsys):
    table = Table("", "images/s")
    table.add("ours", "12.3")
    table.add("theirs", "")
    assert capsys.readouterr().out == "| | images/s |\n|---|---|\n| ours | 12.3 |\n| theirs | |\n"

    table.keep(tmp_path / "results" / "one.json", machine="a GPU", measured=[12.25])
    kept = json.loads((tmp_path / "results" / "one.json").read_text())
    assert kept["columns"] == ["", "images/s"]
    assert kept["rows"] == [["ours", "12.3"], ["theirs", ""]]
    assert kept["machine"] == "a GPU"
    assert kept["measured"] == [12.25]
    assert {"command", "date", "commit", "versions"} <= kept.keys()
    assert kept["versions"]["jax"]


def test_a_page_gets_a_table_below_a_comment():
    comment = "<!-- benchmarks/results/throughput.json -->\n"
    rows = json.loads((RESULTS / "throughput.json").read_text())["rows"]
    text = rendered(f"before\n\n{comment}\nbehind\n")
    assert text.startswith(f"before\n\n{comment}| 96x96 pixels |")
    assert text.endswith(line(rows[-1]) + "\n\nbehind\n")
    assert rendered(text) == text


def run_folder(path: Path, accuracies: list[float]) -> Path:
    path.mkdir()
    rows = [
        {"epoch": epoch, "test_acc": accuracy, "seconds": 40.0 + epoch}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_runs_epoch_by_epoch(tmp_path):
    long = run_folder(tmp_path / "long", [0.9, 0.91, 0.92, 0.9312])
    short = run_folder(tmp_path / "short", [0.8, 0.85])
    table = epochs_table({"`fast`": long, "`d2l`": short}, every=2)
    assert table.columns == ["test accuracy after epoch", "2", "4"]
    assert table.rows == [
        ["`fast`, 42 s an epoch", "0.910", "0.931"],
        ["`d2l`, 42 s an epoch", "0.850", ""],
    ]


def test_the_command_for_runs(tmp_path):
    run_folder(tmp_path / "run", [0.9, 0.91])
    output = tmp_path / "kept.json"
    command = [sys.executable, "-m", "benchmarks.tables", "--epochs", f"seed=0={tmp_path / 'run'}"]
    command += ["--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True)
    kept = json.loads(output.read_text())
    assert kept["rows"] == [["seed=0, 42 s an epoch", "0.900", "0.910"]]
    assert kept["command"].startswith("python -m benchmarks.tables --epochs seed=0=")
    assert "--output" not in kept["command"]
