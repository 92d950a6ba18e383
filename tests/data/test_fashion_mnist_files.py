"""Fashion-MNIST's raw files: every source of the files, and what is said when none is good."""

import gzip
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from resnet_flax.data import fashion_mnist_files as raw_files
from resnet_flax.data.fashion_mnist_files import gather_raw_files, sha256
from resnet_flax.errors import InputError, one_line
from tests.support.fashion_mnist_files import (
    FILES,
    NO_SERVER,
    TinyFashionMNIST,
    shut_off_debian,
    web_server,
    with_header,
    write_debian_tools,
    write_files,
)


class Gathering:
    """One call of `gather_raw_files` for the small data set, and what came of it."""

    def __init__(self, folder: Path, reports: list[str]) -> None:
        self.tiny = TinyFashionMNIST()
        self.manual = folder / "manual"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.reports = reports

    def run(self, address: str = NO_SERVER) -> dict[str, bytes]:
        """Returns the gathered files; `address` is where they are registered."""
        registered = {
            address + name: SimpleNamespace(checksum=sha256(content), size=len(content))
            for name, content in self.tiny.original.items()
        }
        raw = gather_raw_files(registered, manual=self.manual, scratch=self.scratch)
        assert raw.is_relative_to(self.scratch)
        return {path.name: path.read_bytes() for path in raw.iterdir()}

    def error(self, address: str = NO_SERVER) -> str:
        with pytest.raises(InputError) as caught:
            self.run(address)
        message = str(caught.value)
        assert "\n" not in message
        return message


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[str]) -> Gathering:
    """A gathering that no source has the files for, yet."""
    shut_off_debian(monkeypatch)
    monkeypatch.setenv("no_proxy", "*")
    return Gathering(tmp_path, said)


# --- The sources.


def test_files_supplied_by_hand(gathering: Gathering) -> None:
    write_files(gathering.manual, gathering.tiny.original)
    assert gathering.run() == gathering.tiny.original
    assert len(gathering.reports) == 1


def test_the_installed_debian_package(
    gathering: Gathering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = write_files(tmp_path / "installed", gathering.tiny.debian)
    monkeypatch.setattr(raw_files, "_DEBIAN_FOLDER", installed)
    assert gathering.run() == gathering.tiny.original
    assert len(gathering.reports) == 2


def test_the_registered_urls(gathering: Gathering, tmp_path: Path) -> None:
    with web_server(write_files(tmp_path / "site", gathering.tiny.original)) as address:
        assert gathering.run(address) == gathering.tiny.original
    assert len(gathering.reports) == 3


def test_other_data_under_the_registered_urls_are_refused(
    gathering: Gathering, tmp_path: Path
) -> None:
    payloads = gathering.tiny.payloads
    other = {name: gzip.compress(content[::-1]) for name, content in payloads.items()}
    with web_server(write_files(tmp_path / "site", other)) as address:
        assert "has SHA-256" in gathering.error(address)


def test_debian_archive_with_stale_package_lists(
    gathering: Gathering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = write_files(tmp_path / "installed", gathering.tiny.debian)
    tools = write_debian_tools(tmp_path / "tools", installed)
    monkeypatch.setattr(raw_files, "_DEBIAN_FOLDER", Path("/usr/share/datasets/fashion-mnist"))
    if raw_files._DEBIAN_FOLDER.exists():
        pytest.skip("the package is installed here, so it is not fetched")
    monkeypatch.setenv("PATH", str(tools))
    assert gathering.run() == gathering.tiny.original
    calls = (tools / "calls").read_text()
    assert calls.count("download dataset-fashion-mnist") == 2
    assert calls.count(" update") == 1
    names = {"installed", "scratch", "tools"}
    assert {path.name for path in tmp_path.iterdir()} == names  # nothing beside `scratch`


@pytest.mark.parametrize("name", FILES)
def test_debian_header_is_restored(name: str) -> None:
    debian = gzip.compress(b"content", mtime=0)
    restored = raw_files._restore_gzip_header(debian, name)
    assert restored == with_header(debian, name)
    assert gzip.decompress(restored) == b"content"
    assert len(restored) == len(debian) + len(name) - len(".gz") + len("\0")


def test_no_source_at_all(gathering: Gathering) -> None:
    message = gathering.error()
    tried = [f"{gathering.manual} (no such", "/absent (no such"]
    tried += ["TFDS' registered URLs (", "Debian's package dataset-fashion-mnist ([Errno 2]"]
    for part in [*tried, "apt-get", *FILES]:
        assert part in message
    order = ["manual", "/absent", "registered URLs", "Debian's package"]
    for part, line in zip(order, gathering.reports, strict=True):
        assert part in line


# --- Files that are not what they should be.


def truncate(files: dict[str, bytes]) -> None:
    files[FILES[0]] = files[FILES[0]][:-1]


def swap_train_and_test(files: dict[str, bytes]) -> None:
    files[FILES[0]], files[FILES[2]] = files[FILES[2]], files[FILES[0]]


def serve_other_images(files: dict[str, bytes]) -> None:
    content = gzip.decompress(files[FILES[0]])
    files[FILES[0]] = gzip.compress(content[:16] + content[:15:-1])


def damage_one_and_lack_others(files: dict[str, bytes]) -> None:
    files[FILES[2]] = files[FILES[2]][:-1]
    for name in FILES[:2]:
        del files[name]


@pytest.mark.parametrize(
    "spoil", [truncate, swap_train_and_test, serve_other_images, damage_one_and_lack_others]
)
def test_a_bad_file_supplied_by_hand_is_named(
    spoil: Callable[[dict[str, bytes]], None], gathering: Gathering
) -> None:
    files = dict(gathering.tiny.original)
    spoil(files)
    manual = write_files(gathering.manual, files)
    message = gathering.error()
    assert message.startswith((f"{manual}: {FILES[0]} has", f"{manual}: {FILES[2]} has"))
    assert "replace it" in message


def test_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(TimeoutError()) == "TimeoutError"
