"""Checkpoints as files: damaged ones, places that cannot be written, and no unpickling."""

import argparse
import errno
import json
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_flax.errors import InputError
from resnet_flax.weights import (
    from_torch,
    load_safetensors,
    read_checkpoint,
    save_safetensors,
    write_checkpoint,
)
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

        def fill(path: Path, content: bytes) -> int:
            with path.open("wb") as file:
                file.write(content[:4])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", fill)
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


# --- As training scripts and downloads leave them.

TENSORS = {key: torch.from_numpy(value) for key, value in SMALL_STATE_DICT.items()}
OTHERS = {key: value + 1 for key, value in TENSORS.items()}


def refused(path: Path, part: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(path, part)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 800
    return line


def saved(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "net.pth", **options)
    return folder / "net.pth"


def assert_read(path: Path, tensors: dict[str, torch.Tensor], part: str | None = None) -> None:
    found = read_checkpoint(path, part)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


ADAM = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.ones(())}}, "param_groups": [{}]}


@pytest.mark.parametrize(
    "names", ["net", "network", "weights", "ema", "state_dict_ema", "trainer.best", "model.module"]
)
def test_the_one_state_dict_is_found_under_any_name(names: str, tmp_path: Path) -> None:
    content: Any = TENSORS
    for name in reversed(names.split(".")):
        content = {"epoch": 3, "loss": torch.ones(()), name: content, "optimizer": ADAM}
    path = saved(tmp_path, content)
    assert_read(path, TENSORS)
    assert_read(path, TENSORS, names)
    assert refused(path, "nets") == f"{path} has no `part` 'nets', but {names}"


@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema", "ema", "ema.module", "modelEMA"])
@pytest.mark.parametrize("plain", ["state_dict", "model", "net"])
def test_an_average_beside_the_weights_is_told_and_can_be_chosen(
    plain: str, ema: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "resnet_flax")
    outer, _, inner = ema.partition(".")
    path = saved(tmp_path, {outer: {inner: OTHERS} if inner else OTHERS, plain: TENSORS})
    assert_read(path, TENSORS)
    assert caplog.messages == [f"read {plain} of {path}; `part` chooses {ema}"]
    assert_read(path, OTHERS, ema)


def test_of_several_state_dicts_one_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, {"generator": TENSORS, "discriminator": OTHERS, "epoch": 3})
    assert refused(path) == f"{path} holds generator, discriminator: choose one of them by `part`"
    assert_read(path, OTHERS, "discriminator")


def test_an_average_within_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "resnet_flax")
    path = saved(tmp_path, TENSORS | {"ema": OTHERS, "n_averaged": 5})
    assert_read(path, TENSORS)
    assert caplog.messages == [
        f'read the outermost ("") of {path}; `part` chooses ema',
        "left behind, being no tensors: ema, n_averaged",
    ]


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    path = saved(tmp_path, TENSORS)
    assert refused(path, "ema") == f"{path} has no `part` 'ema', but the outermost (\"\")"
    assert_read(path, TENSORS, "")


def test_one_state_dict_under_two_names_has_both(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": TENSORS, "state_dict_ema": TENSORS})
    assert_read(path, TENSORS)
    assert_read(path, TENSORS, "state_dict_ema")


def test_tensors_beside_a_state_dict_are_none(tmp_path: Path) -> None:
    beside = {"class_weight": torch.ones(3), "loss": torch.ones(())}
    assert_read(saved(tmp_path, beside | {"net": TENSORS}), TENSORS)


def test_mappings_that_hold_themselves_and_deep_ones_end(tmp_path: Path) -> None:
    circle: dict[str, Any] = {"weight": 1}
    circle |= {"a": circle, "b": circle}
    assert "holds no state dict" in refused(saved(tmp_path, circle))
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"a": deep}
    assert "holds no state dict" in refused(saved(tmp_path, deep))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_no_tensor_is_named(legacy: bool, tmp_path: Path) -> None:
    for value, name in (
        (argparse.Namespace(epochs=3), "argparse.Namespace"),
        (np.float64(0.5), "numpy._core.multiarray.scalar"),
        (Path("data"), f"{type(Path()).__module__}.{type(Path()).__name__}"),
        (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
    ):
        path = saved(
            tmp_path,
            {"model": TENSORS, "args": value},
            _use_new_zipfile_serialization=not legacy,
        )
        line = refused(path)
        assert line.startswith(f"{path} is not a file of tensors alone: it holds {name}")
        assert "torch.save(net.state_dict(), FILE)" in line
        for advice in ("add_safe_globals", "Re-running", "\x1b", "[1m"):
            assert advice not in line


def test_all_kinds_of_objects_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": argparse.Namespace(), "b": Path(), "model": TENSORS})
    assert "it holds argparse.Namespace, pathlib." in refused(path)


PICTURE = b"\x89PNG\r\n\x1a\n\0\0"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is damaged: it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the weigh"),
        (b"<!DOCTYPE html><html>", "is a web page, not a checkpoint: download the file itself"),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?><Error>", "is a web page, not a checkpoint"),
        (b'{"error": "not found"}', "is damaged"),
        (b"Entry not found", "a text, 'Entry not found'"),
        (b"\x89HDF\r\n\x1a\n\0", "is an HDF5 file"),
        (b"\x1f\x8b\x08\0\0\0", "is compressed by gzip"),
        (PICTURE, "is damaged"),
    ],
)
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net.bin"])
def test_what_is_downloaded_in_a_checkpoints_place_is_named(
    content: bytes, told: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    line = refused(path)
    assert told in line
    assert line.startswith(f"{path} is ")
    assert "weights_only" not in line


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_a_download_that_was_cut_off_is_damaged(share: float, tmp_path: Path) -> None:
    path = saved(tmp_path, TENSORS)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert f"{path} is damaged" in refused(path)


def test_the_other_format_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, TENSORS).rename(tmp_path / "net.safetensors")
    assert refused(path) == f"{path} is in PyTorch's format: convert it to .safetensors"
    save_safetensors(tmp_path / "net.bin", SMALL_STATE_DICT)
    path = tmp_path / "net.bin"
    assert refused(path) == f"{path} is in the format of safetensors: call it *.safetensors"
    path.write_bytes(pickle.dumps(SMALL_STATE_DICT))
    assert "is a pickle that torch.save did not write" in refused(path)


def test_nothing_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.pth")
    assert refused(tmp_path / "net.pth") == f"cannot read {tmp_path / 'net.pth'}: not a file"


# Public reports: facebookresearch/moco#84 (several networks' keys in one state dict), and
# safetensors/safetensors#683 (dtypes that NumPy has not).


@pytest.mark.parametrize("part", ["module.encoder_k", "state_dict.module.encoder_k"])
def test_a_part_may_be_what_the_keys_begin_with(part: str, tmp_path: Path) -> None:
    both = {f"module.encoder_q.{key}": value for key, value in TENSORS.items()}
    both |= {f"module.encoder_k.{key}": value for key, value in OTHERS.items()}
    path = saved(tmp_path, {"epoch": 3, "state_dict": both | {"module.queue": torch.ones(2)}})
    expected = {f"module.encoder_k.{key}": value for key, value in OTHERS.items()}
    assert_read(path, expected, part)
    assert "has no `part` 'encoder', but state_dict" in refused(path, "encoder")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_numbers_of_a_byte_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    path, name = tmp_path / "net.safetensors", str(dtype).removeprefix("torch.")
    safetensors.torch.save_file({"fc.weight": torch.ones(2, 2).to(dtype)}, path)
    assert refused(path) == (
        f"{path} holds numbers of {name}, which NumPy has not: save them as float32"
    )


# --- In shards.


def write_shards(folder: Path, name: str = "model", ending: str = "safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    places = {}
    for number in (0, 1):
        file = f"{name}-0000{number + 1}-of-00002.{ending}"
        keys = [*SMALL_STATE_DICT][number::2]
        write_checkpoint(folder / file, {key: SMALL_STATE_DICT[key] for key in keys})
        places |= dict.fromkeys(keys, file)
    index = folder / f"{name}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    expected = from_torch(SMALL, SMALL_STATE_DICT)
    assert_same(from_torch(SMALL, load_safetensors(index)), expected)
    assert_same(from_torch(SMALL, read_checkpoint(index)), expected)
    renamed = index.rename(tmp_path / "model.pth")
    assert_same(from_torch(SMALL, read_checkpoint(renamed)), expected)
    index = write_shards(tmp_path, "pytorch_model", "bin")
    assert_same(from_torch(SMALL, read_checkpoint(index)), expected)
    with pytest.raises(InputError, match=r"00001-of-00002\.bin is in PyTorch's format"):
        load_safetensors(index)


def test_shards_in_hugging_faces_cache_are_links(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in index.parent.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    assert load_safetensors(tmp_path / "snapshot" / index.name).keys() == SMALL_STATE_DICT.keys()


def test_indices_that_are_wrong_are_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "model")
    save_safetensors(tmp_path / "outside.safetensors", SMALL_STATE_DICT)
    shard = tmp_path / "model" / "model-00001-of-00002.safetensors"

    def listing(places: Any) -> str:
        index.write_text(json.dumps({"weight_map": places}))
        return refused(index)

    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        assert listing({"a": name}) == f"{index} leads out of its folder, to '{name}'"
    link = index.with_name("link.safetensors")
    link.symlink_to("../outside.safetensors")
    assert "leads out of its folder" in listing({"a": link.name})
    for name in ("absent.safetensors", "\0", "x" * 5000):
        assert listing({"a": name}).startswith("cannot read '")
    assert "the shards of" in listing({"absent\n": shard.name})
    for places in ([], None, {"a": 3}, {"a": None}, {"a": index.name}):
        assert f"{index} is damaged" in listing(places)
    index.write_text('{"weight_map": ' + "[" * 100_000)
    assert "is damaged" in refused(index)
    shard.write_bytes(shard.read_bytes()[:100])
    assert f"{shard} is damaged" in listing({"a": shard.name})
