"""Fashion-MNIST: what is returned, and what is kept in the data folder."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import Dataset, load_fashion_mnist
from resnet_flax.data import fashion_mnist as data
from resnet_flax.data.fashion_mnist_files import sha256
from resnet_flax.data.tfds import quiet_tfds
from resnet_flax.errors import InputError
from tests.support.fashion_mnist_files import (
    FILES,
    NO_SERVER,
    SIZES,
    TinyFashionMNIST,
    shut_off_debian,
    write_files,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TinyFashionMNIST:
    """Makes the module take a small random data set for Fashion-MNIST, and no source have it."""
    tiny = TinyFashionMNIST()
    monkeypatch.setattr(data, "_SIZES", SIZES)
    monkeypatch.setattr(data, "_CONTENT_SHA256", tiny.content_sha256)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # TFDS leaves empty folders there
    shut_off_debian(monkeypatch)
    register(monkeypatch, tiny.original)
    return tiny


def register(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    """Puts `files` into TFDS' table of Fashion-MNIST's raw files."""
    with quiet_tfds() as tfds:
        from tensorflow_datasets.core.download.checksums import UrlInfo

    infos = {
        NO_SERVER + name: UrlInfo(len(content), sha256(content), name)
        for name, content in files.items()
    }
    monkeypatch.setattr(tfds.image_classification.FashionMNIST, "url_infos", infos)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def prepared(tiny: TinyFashionMNIST, folder: Path, tmp_path: Path) -> Path:
    """A data folder with the small data set in TFDS' form, and without other sources."""
    manual = write_files(folder / "downloads" / "manual", tiny.original)
    load_fashion_mnist(folder)
    manual.rename(tmp_path / "used")
    (folder / "downloads").rmdir()
    return folder


def assert_is(datasets: tuple[Dataset, Dataset], tiny: TinyFashionMNIST) -> None:
    for dataset, split in zip(datasets, SIZES, strict=True):
        np.testing.assert_array_equal(dataset.images, tiny.images[split])
        np.testing.assert_array_equal(dataset.labels, tiny.labels[split])


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def error_of(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_fashion_mnist(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- What is returned.


def test_fashion_mnist_is_what_its_authors_published(
    fashion_mnist: tuple[Dataset, Dataset],
) -> None:
    train, test = fashion_mnist
    assert (train.images.shape, test.images.shape) == ((60_000, 28, 28, 1), (10_000, 28, 28, 1))
    assert train.images.dtype == test.images.dtype == np.uint8
    assert train.labels.dtype == test.labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(train.labels), [6_000] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [1_000] * 10)
    # The normalisation constants that the literature gives for this training set.
    pixels = train.images / np.float32(255)
    assert pixels.mean(dtype=np.float64) == pytest.approx(0.2860, abs=5e-5)
    assert pixels.std(dtype=np.float64) == pytest.approx(0.3530, abs=5e-5)


def test_examples_come_in_the_order_of_the_original_files(
    fashion_mnist: tuple[Dataset, Dataset],
) -> None:
    train, test = fashion_mnist
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


def test_class_names_are_in_tfds_order() -> None:
    with quiet_tfds() as tfds:
        names = tfds.builder("fashion_mnist").info.features["label"].names
    assert [name.lower().removesuffix("/top") for name in names] == list(data.FASHION_MNIST_CLASSES)


def test_a_later_start_needs_neither_tfds_nor_tensorflow(
    fashion_mnist: tuple[Dataset, Dataset],
) -> None:
    program = (
        "import sys; from resnet_flax.data import load_fashion_mnist; load_fashion_mnist();"
        "print([name for name in sys.modules if name.startswith('tensorflow')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- Preparing the data folder.


def test_files_supplied_by_hand(
    tiny: TinyFashionMNIST, folder: Path, capfd: pytest.CaptureFixture[str], said: list[str]
) -> None:
    write_files(folder / "downloads" / "manual", tiny.original)
    assert_is(load_fashion_mnist(folder), tiny)
    assert any("preparing" in line for line in said)
    assert capfd.readouterr() == ("", "")  # TFDS says nothing of its own
    assert leftovers(folder) == ["downloads", "fashion_mnist"]
    assert leftovers(folder / "downloads") == ["manual"]
    assert leftovers(folder / "fashion_mnist") == ["3.0.1", "decoded-3.0.1.bin"]
    assert "tensorflow" not in sys.modules


def test_the_default_folder_is_the_one_of_tfds(
    tiny: TinyFashionMNIST, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert_is(load_fashion_mnist(), tiny)


def test_nothing_is_left_when_no_source_has_the_files(tiny: TinyFashionMNIST, folder: Path) -> None:
    message = error_of(folder)
    assert message.startswith(f"no source has Fashion-MNIST: files in {folder}/downloads/manual (")
    assert leftovers(folder) == []


def test_nothing_is_left_of_a_bad_file_supplied_by_hand(
    tiny: TinyFashionMNIST, folder: Path
) -> None:
    bad = tiny.original | {FILES[0]: tiny.original[FILES[0]][:-1]}
    manual = write_files(folder / "downloads" / "manual", bad)
    assert error_of(folder).startswith(f"{manual}: {FILES[0]} has SHA-256")
    assert leftovers(folder) == ["downloads"]


# --- The data folder.


def test_other_content_in_the_prepared_folder_is_never_loaded(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_CONTENT_SHA256", "0" * 64)
    before = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    message = error_of(prepared)
    assert f"{prepared / 'fashion_mnist' / '3.0.1'} does not hold Fashion-MNIST" in message
    assert {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "no information"])
def test_a_damaged_prepared_folder_is_named(damage: str, prepared: Path) -> None:
    (prepared / "fashion_mnist" / "decoded-3.0.1.bin").unlink()
    version = prepared / "fashion_mnist" / "3.0.1"
    (shard,) = version.glob("*train.array_record*")
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "missing":
        shard.unlink()
    else:
        (version / "dataset_info.json").write_text("{")
    message = error_of(prepared)
    assert f"cannot read {version}" in message
    assert "move it away" in message
    assert version.exists()


def test_a_damaged_decoded_copy_is_rebuilt(
    tiny: TinyFashionMNIST, prepared: Path, said: list[str]
) -> None:
    copy = prepared / "fashion_mnist" / "decoded-3.0.1.bin"
    good = copy.read_bytes()
    for bad in (good[:-1], bytes([good[0] ^ 1]) + good[1:], b""):
        copy.write_bytes(bad)
        said.clear()
        assert_is(load_fashion_mnist(prepared), tiny)
        assert f"{copy} is damaged" in said[0]
        assert copy.read_bytes() == good


def test_the_stock_tfds_builder_reads_the_prepared_folder(
    tiny: TinyFashionMNIST, prepared: Path
) -> None:
    with quiet_tfds() as tfds:
        builder = tfds.builder("fashion_mnist", data_dir=prepared)
        assert type(builder) is tfds.image_classification.FashionMNIST
        assert builder.is_prepared()
        assert {name: split.num_examples for name, split in builder.info.splits.items()} == SIZES
        for split, source in builder.as_data_source().items():
            read = {(example["image"].tobytes(), int(example["label"])) for example in source}
            both = zip(tiny.images[split], tiny.labels[split], strict=True)
            assert read == {(image.tobytes(), int(label)) for image, label in both}


def test_a_folder_that_tfds_prepared_with_tensorflow(
    tiny: TinyFashionMNIST, prepared: Path
) -> None:
    """TFDS' default there is TFRecord: length, checksum, record, checksum."""
    with quiet_tfds() as tfds:
        builder = tfds.builder("fashion_mnist", data_dir=prepared)
        sources = builder.as_data_source(deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    version = prepared / "fashion_mnist" / "3.0.1"
    for split, source in sources.items():
        (shard,) = version.glob(f"*-{split}.*")
        records = [struct.pack("<QI", len(r), 0) + r + bytes(4) for r in source]
        shard.unlink()
        Path(str(shard).replace("array_record", "tfrecord")).write_bytes(b"".join(records))
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    (prepared / "fashion_mnist" / "decoded-3.0.1.bin").unlink()
    assert_is(load_fashion_mnist(prepared), tiny)


def test_a_file_in_the_place_of_the_data_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert f"cannot keep Fashion-MNIST in {path}" in error_of(path)


def test_a_folder_without_write_permission(
    tiny: TinyFashionMNIST,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    """Root may write everywhere, so the system's refusal is played."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(prepared))

    monkeypatch.setattr(data.tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    (prepared / "fashion_mnist" / "decoded-3.0.1.bin").unlink()
    assert_is(load_fashion_mnist(prepared), tiny)  # reading still works
    assert "not kept: cannot write" in said[-1]
    assert said[-1].endswith("Permission denied")
    assert leftovers(prepared / "fashion_mnist") == ["3.0.1"]
    empty = prepared / "elsewhere"
    assert f"cannot keep Fashion-MNIST in {empty}: Permission denied" in error_of(empty)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_an_interrupted_preparation(
    stop: type[BaseException],
    tiny: TinyFashionMNIST,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_files(folder / "downloads" / "manual", tiny.original)
    save, saved = Image.Image.save, []

    def interrupted(*args: object, **kwargs: object) -> None:
        saved.append(leftovers(folder))
        if len(saved) == 20:
            raise stop
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(stop):
            load_fashion_mnist(folder)
    assert saved[-1] != ["downloads"]  # something was there to be left
    assert leftovers(folder) == ["downloads"]
    assert_is(load_fashion_mnist(folder), tiny)


def test_two_runs_may_prepare_at_once(
    tiny: TinyFashionMNIST, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(folder / "downloads" / "manual", tiny.original)
    inner = []
    builder = data._fashion_mnist_builder

    def overtaken(tfds: Any) -> Any:
        monkeypatch.setattr(data, "_fashion_mnist_builder", builder)
        inner.append(load_fashion_mnist(folder))
        return builder(tfds)

    monkeypatch.setattr(data, "_fashion_mnist_builder", overtaken)
    outer = load_fashion_mnist(folder)
    assert_is(inner[0], tiny)
    assert_is(outer, tiny)
    assert leftovers(folder) == ["downloads", "fashion_mnist"]
