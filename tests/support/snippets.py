"""Runs the Python snippets of a Markdown page, in its order, and compares what the page shows.

A block of text that follows a snippet directly is what the snippet prints. Words must be the same;
numbers may differ as float32 does between machines.
"""

import contextlib
import io
import logging
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FENCES = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.M | re.S)
FOREIGN = re.compile(r"^(?:import|from) (?:timm|transformers)\b", re.M)


class Snippet(NamedTuple):
    """One block of code of a page.

    Attributes:
        line: the page's line before it.
        code: what is run.
        shown: what the page says that it prints, or None.
    """

    line: int
    code: str
    shown: str | None

    @property
    def foreign(self) -> bool:
        """Whether it needs the extra ``foreign``."""
        return FOREIGN.search(self.code) is not None


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text()
    found = [
        Snippet(text.count("\n", 0, match.start(1)), match[1], match[2])
        for match in FENCES.finditer(text)
    ]
    assert len(found) == text.count("```python"), f"{page.name}: a fence is indented or open"
    return found


def run_page(page: Path, *, foreign: bool = False) -> dict[str, Any]:
    """Runs the page's snippets in one namespace, and returns it.

    Args:
        page: the Markdown file.
        foreign: run also those that need timm or transformers.
    """
    namespace: dict[str, Any] = {"__name__": page.stem}
    logger = logging.getLogger("resnet_flax")  # a page may show what is logged
    level, handlers = logger.level, [*logger.handlers]
    try:
        _run_snippets(page, namespace, foreign)
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers
    return namespace


def _run_snippets(page: Path, namespace: dict[str, Any], foreign: bool) -> None:
    for snippet in snippets(page):
        if snippet.foreign and not foreign:
            continue
        code = compile("\n" * snippet.line + snippet.code, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if snippet.shown is not None:
            where = f"{page.name}, line {snippet.line}"
            assert same(snippet.shown, printed.getvalue()), f"{where}:\n{printed.getvalue()}"
        print(printed.getvalue(), end="")


def same(shown: str, printed: str) -> bool:
    """Whether two texts have the same words, and numbers that are close or both mere rounding."""
    ours, theirs = shown.split(), printed.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(shown: str, printed: str) -> bool:
    if shown == printed:
        return True
    try:
        numbers = float(shown.strip(",;:")), float(printed.strip(",;:"))
    except ValueError:
        return False
    return math.isclose(*numbers, rel_tol=0.02, abs_tol=2e-5)
