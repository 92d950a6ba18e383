"""The documentation's snippets are run, its table of eases is counted, and its pages are there."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.foreign import import_timm
from tests.support.snippets import ROOT, run_page, same, snippets

PAGES = sorted((ROOT / "docs").glob("*.md"))
FOREIGN_PAGES = [page for page in PAGES if any(snippet.foreign for snippet in snippets(page))]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def name(page: Path) -> str:
    return page.name


@pytest.fixture
def given(request, torchvision_checkpoint):
    """What a page asks the reader to have, in the current folder."""
    page = request.getfixturevalue("page")
    if page.name == "pretrained.md":
        give_pretrained(request.getfixturevalue("hub"))


def give_pretrained(hub):
    """A repository in timm's form, of random weights; a photo, and a folder of pictures."""
    told = {"interpolation": "bicubic", "crop_pct": 0.95, "input_size": [3, 224, 224]}
    config = {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": told}
    repository = Path("repository")
    repository.mkdir()
    (repository / "config.json").write_text(json.dumps(config))
    Path("checkpoint.safetensors").rename(repository / "model.safetensors")
    hub.serve("timm/resnet18.a1_in1k", repository)
    random = np.random.default_rng(0)
    photo = Image.fromarray(random.integers(0, 256, (120, 90, 3), np.uint8))
    photo.save("photo.jpg")
    for folder in (Path("pets", kind) for kind in ("cats", "dogs")):
        folder.mkdir(parents=True)
        for number in range(8):
            photo.rotate(number).save(folder / f"{number}.jpg")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_snippets_of_a_page(page, given, fashion_mnist):
    run_page(page)


@pytest.mark.foreign
@pytest.mark.parametrize("page", FOREIGN_PAGES, ids=name)
def test_the_snippets_with_other_peoples_networks(page, given):
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


def test_files_that_are_named_are_there():
    top = "tests|benchmarks|docs|examples|resnet_flax"
    named = re.compile(rf"(?<![\w./-])(?:{top})/[\w/]+\.(?:py|md|json|png)\b")
    sources = [path for folder in top.split("|") for path in (ROOT / folder).rglob("*.py")]
    absent = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sources]
        for name in named.findall(path.read_text())
        if not (ROOT / name).exists() and "NAME" not in name
    }
    assert absent == set()


@pytest.mark.parametrize("file", ["CHANGELOG.md", "CITATION.cff"])
def test_the_version_is_told(file):
    assert re.search(rf"\b{re.escape(VERSION)}\b", (ROOT / file).read_text())
