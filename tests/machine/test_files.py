"""`resnet_flax.machine.files`: all of a file or nothing, and links that stay in their folder."""

import errno
import os
from pathlib import Path

import pytest

from resnet_flax.errors import InputError
from resnet_flax.machine.files import expanded, inside, whole_file
from tests.support.environment import without_home


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as unfinished:
        1 / (unfinished.write_text("half") - len("half"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_its_place_and_no_folder_at_all_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    found = (("folder", "Is a directory"), ("", "Is a directory"))
    for name, why in (*found, ("none/file", "No such file or directory")):
        with (
            pytest.raises(InputError, match=f"^cannot write {tmp_path / name}: {why}$"),
            whole_file(tmp_path / name) as unfinished,
        ):
            unfinished.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_in_the_unfinished_files_place_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    with whole_file(tmp_path / "file") as unfinished:
        name = unfinished.name
        unfinished.write_text("old")
    (tmp_path / name).symlink_to(other)
    with whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("new")
    assert other.read_text() == "mine"


def test_links_stay_in_the_folder(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.write_text("")
    (home / "file").write_text("")
    (home / "near").symlink_to("file")
    (home / "far").symlink_to(outside)
    (home / "circle").symlink_to("circle")
    assert inside(home, home / "near") == home / "file"
    with pytest.raises(InputError, match="is a link out of the folder"):
        inside(home, home / "far")
    for name in ("circle", "gone"):
        with pytest.raises(OSError, match=name):
            inside(home, home / name)


@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_a_read_only_mount_is_told_whatever_the_clean_up_says(tmp_path, monkeypatch, fails):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "other words")

    monkeypatch.setattr(Path, fails, refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    path = tmp_path / "file"
    with (
        pytest.raises(InputError, match=f"^cannot write {path}: Read-only file system$"),
        whole_file(path) as unfinished,
    ):
        unfinished.write_text("new")
    assert not path.exists()


def test_two_that_write_at_once_keep_out_of_each_others_way(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as one, whole_file(path) as two:
        two.write_text("two")
        one.write_text("one")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_no_home_folder_is_told_with_how_to_mend_it(monkeypatch) -> None:
    without_home(monkeypatch)
    with pytest.raises(InputError, match=r"^there is no home folder for ~/data: name the folder"):
        expanded("~/data")
    assert expanded("data") == Path("data")


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(InputError, match=r"pipe: it is no plain file$"),
        whole_file(tmp_path / "pipe"),
    ):
        pytest.fail("went on")
    assert (tmp_path / "pipe").is_fifo()


def test_the_current_folder_is_no_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^cannot write \.: Is a directory$"), whole_file("."):
        pytest.fail("went on")
