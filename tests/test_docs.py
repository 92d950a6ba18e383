"""The documentation's snippets are run, its table of eases is counted, and its pages are there."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.foreign import import_timm
from tests.support.snippets import ROOT, run_page, same, snippets

PAGES = sorted((ROOT / "docs").glob("*.md"))
FOREIGN_PAGES = [page for page in PAGES if any(snippet.foreign for snippet in snippets(page))]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def name(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_snippets_of_a_page(page, torchvision_checkpoint, fashion_mnist):
    run_page(page)


@pytest.mark.foreign
@pytest.mark.parametrize("page", FOREIGN_PAGES, ids=name)
def test_the_snippets_with_other_peoples_networks(page, torchvision_checkpoint):
    import_timm()
    run_page(page, foreign=True)


def test_what_is_printed_must_be_what_is_shown():
    assert same("loss 0.501,  (4, 3)\n", "loss 0.502, (4, 3)")
    assert same("rounding 3.1e-07", "rounding 1.2e-06")
    assert not same("loss 0.5", "loss 0.6")
    assert not same("11,178,378", "11,178,379")
    assert not same("True", "False")
    assert not same("one two", "one")


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES if f" {page.name}\n" not in navigation] == []


@pytest.mark.parametrize("file", ["CHANGELOG.md", "CITATION.cff"])
def test_the_version_is_told(file):
    assert re.search(rf"\b{re.escape(VERSION)}\b", (ROOT / file).read_text())
