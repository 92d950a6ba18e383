"""Tables of figures: a benchmark prints one and keeps it as JSON, and the pages show what was kept.

``python -m benchmarks.tables`` renders ``benchmarks/results/*.json`` into ``README.md`` and
``docs/*.md``, below each comment such as ``<!-- benchmarks/results/throughput.json -->``. With
``--epochs LABEL=RUN_DIR ... --output FILE`` it keeps a table of finished runs' test accuracies by
epoch instead; its commit, machine and versions are those of where it is called.

A file says ``"transcribed": true`` where no benchmark wrote it: its figures stood in a page before
there were such files, which its commit and date put there.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = re.compile(r"^(<!-- (benchmarks/results/\w+\.json) -->\n)(?:\|.*\n)*", re.M)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")


class Table:
    """A table of figures, printed in Markdown row by row."""

    def __init__(self, *columns: str) -> None:
        self.columns, self.rows = list(columns), list[list[str]]()
        print(heading(columns), flush=True)

    def add(self, *cells: str) -> None:
        """Prints a row."""
        self.rows.append(list(cells))
        print(line(cells), flush=True)

    def keep(self, path: Path, **more: Any) -> None:
        """Writes it as JSON, with its origin; ``more`` overrides that, or stands beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**origin(), **more, "columns": self.columns, "rows": self.rows}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def line(cells: Sequence[str]) -> str:
    """A row in Markdown."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def heading(columns: Sequence[str]) -> str:
    """The two lines above the rows."""
    return line(columns) + "\n" + "|---" * len(columns) + "|"


def output_flag(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds ``--output``, with the place that the pages are rendered from as its default."""
    text = f"keeps the table (default: benchmarks/results/{name}.json)"
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help=text)


def origin() -> dict[str, Any]:
    """What made a table: the command, where and with what it ran, and when."""
    command = re.sub(r" --output \S+", "", shlex.join(["python", *sys.orig_argv[1:]]))
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def commit() -> str:
    """The commit that is measured, "-dirty" if more than tables and pages has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("diff", "--name-only", "HEAD", "--", ".", ":!benchmarks/results", ":!*.md")
    return git("rev-parse", "--short=7", "HEAD") + ("-dirty" if changed else "")


def machine() -> str:
    """The number of cores, the processor's name and its widest vectors, as far as Linux tells."""
    file = Path("/proc/cpuinfo")
    about = file.read_text() if file.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", about, re.M)
    parts = [f"{os.cpu_count()} cores", name[1] if name else platform.machine()]
    return ", ".join(parts + [word for word in ("avx512f", "avx2") if word in about][:1])


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of those packages that a figure may depend on and that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spread(values: list[float], digits: int = 1, unit: str = "") -> str:
    """Median and range."""
    low, middle, high = (
        f"{each:.{digits}f}" for each in (min(values), statistics.median(values), max(values))
    )
    return f"{middle}{unit} ({low}-{high})"


def rendered(page: str) -> str:
    """The page with every kept table as its file has it."""

    def table(place: re.Match[str]) -> str:
        kept = json.loads((ROOT / place[2]).read_text())
        lines = [heading(kept["columns"]), *map(line, kept["rows"])]
        return place[1] + "".join(f"{each}\n" for each in lines)

    return PLACES.sub(table, page)


def epochs_table(runs: dict[str, Path], every: int = 1) -> Table:
    """Test accuracies of runs by epoch, with the median seconds of an epoch.

    Args:
        runs: label -> run folder.
        every: shows each epoch whose number this divides.
    """
    read = {
        label: [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        for label, folder in runs.items()
    }
    shown = range(every, max(map(len, read.values())) + 1, every)
    table = Table("test accuracy after epoch", *map(str, shown))
    for label, rows in read.items():
        found = {row["epoch"]: f"{row['test_acc']:.3f}" for row in rows}
        seconds = statistics.median(row["seconds"] for row in rows)
        table.add(f"{label}, {seconds:.0f} s an epoch", *(found.get(each, "") for each in shown))
    return table


def main() -> None:
    """Renders the pages, or keeps a table of runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", nargs="+", metavar="LABEL=RUN_DIR")
    parser.add_argument("--every", type=int, default=1, help="shows each so many epochs")
    parser.add_argument("--output", type=Path, help="where the table of --epochs goes")
    options = parser.parse_args()
    if options.epochs:
        if not options.output:
            parser.error("--epochs needs --output")
        labels = (each.rpartition("=") for each in options.epochs)
        runs = {label: Path(folder) for label, _, folder in labels}
        epochs_table(runs, options.every).keep(options.output)
        return
    for page in PAGES:
        before = page.read_text()
        if (after := rendered(before)) != before:
            page.write_text(after)
            print(f"{page.relative_to(ROOT)}: rendered")


if __name__ == "__main__":
    main()
