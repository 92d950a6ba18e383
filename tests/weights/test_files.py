"""Checkpoints as files: damaged ones, places that cannot be written, and no unpickling."""

import errno
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from resnet_flax.errors import InputError
from resnet_flax.weights import from_torch, load_safetensors, save_safetensors, write_checkpoint
from tests.support.state_dicts import SMALL, SMALL_STATE_DICT, assert_same


@pytest.fixture(scope="module")
def safetensors_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Any]:
    """A file, its bytes and its variables."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_safetensors(path, SMALL_STATE_DICT)
    return path, path.read_bytes(), from_torch(SMALL, SMALL_STATE_DICT)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_safetensors_files_are_refused(
    safetensors_file: tuple[Path, bytes, Any], data: st.DataObject
) -> None:
    path, content, variables = safetensors_file
    header = 8 + struct.unpack("<Q", content[:8])[0]
    place = data.draw(st.integers(0, header - 1))
    damage = data.draw(st.sampled_from(["byte", "cut", "insert", "append"]))
    if damage == "byte":
        damaged = bytearray(content)
        damaged[place] = data.draw(st.integers(0, 255))
    elif damage == "cut":
        damaged = content[: data.draw(st.integers(0, len(content) - 1))]
    elif damage == "insert":
        damaged = content[:place] + data.draw(st.binary(min_size=1)) + content[place:]
    else:
        damaged = content + data.draw(st.binary(min_size=1))
    path.write_bytes(damaged)
    try:
        loaded = from_torch(SMALL, load_safetensors(path))
    except InputError:
        return
    # Only a byte that says nothing about tensors (it is in the metadata) may leave a file whole.
    assert damage == "byte"
    assert_same(loaded, variables)


def test_errors_of_files_name_the_file(tmp_path: Path) -> None:
    missing, damaged = tmp_path / "missing.safetensors", tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"junk")
    for path, message in (
        (missing, "cannot read"),
        (tmp_path, "cannot read"),
        (damaged, "damaged"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_safetensors(path)
        assert str(path) in str(error.value)
    with pytest.raises(InputError, match="cannot write"):
        save_safetensors(tmp_path / "no" / "folder.safetensors", {})


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("fault", ["no folder", "a folder", "a full disk"])
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if fault == "no folder":
        path = tmp_path / "no" / name
    elif fault == "a folder":
        path.mkdir()
    else:

        def fill(arrays: Any, path: Path, *_: Any) -> None:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing:\nNo space left on device")

        def fill_file(state_dict: Any, file: Any) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("resnet_flax.weights.files.save_file", fill)
        monkeypatch.setattr("torch.save", fill_file)
    before = list(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        write_checkpoint(path, {"a": np.zeros(1, np.float32)})
    assert str(error.value).startswith(f"cannot write {path}: ")
    assert str(error.value).isprintable()
    assert list(tmp_path.iterdir()) == before


def test_arrays_that_are_not_contiguous_are_saved_as_they_are(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "array.safetensors"
    save_safetensors(path, {"turned": array.T, "scalar": np.array(3)}, {"epoch": "1"})
    loaded = load_safetensors(path)
    assert np.array_equal(loaded["turned"], array.T)
    assert loaded["scalar"].shape == ()
    assert [path.name for path in tmp_path.iterdir()] == ["array.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"a": np.zeros(1)})
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"cannot write {re.escape(str(path))}"):
        save_safetensors(path, {"a": np.zeros(1, dtype=object)})
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
