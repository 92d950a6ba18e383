"""TFDS' sets, their splits, and what is said when there is none."""

import importlib.util
import io
import json
import math
import pickle
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import LazyImages, Resizing, Splits, load_dataset
from resnet_flax.data import tfds as tfds_sets
from resnet_flax.data.image_files import cropped, resized
from resnet_flax.data.tfds import quiet_tfds
from resnet_flax.errors import InputError
from tests.support.image_files import assert_same_images, random_image

CLASSES = ("circle", "square", "star")


COUNTS = {"train": 12, "test": 6}


def build(name: str = "shapes", register: bool = False, **changes: Any) -> tuple[Any, list]:
    """Makes a TFDS builder of a small data set, which needs no TensorFlow; returns its images too.

    Args:
        name: of the data set.
        register: whether `tfds.builder` knows it, prepared or not.
        changes: ``counts`` of examples in each split, the image's ``shape``, the first ``label``,
            the ``keys`` of image and label.
    """
    counts, shape = changes.get("counts", COUNTS), changes.get("shape", (8, 8, 3))
    size = tuple(side or 12 for side in shape[1::-1])
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[shape[2]]
    made = [random_image(number, size, mode) for number in range(sum(counts.values()))]
    with quiet_tfds() as tfds:

        class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Image(shape=shape),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "number": tfds.features.Scalar(np.int64),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=changes.get("keys", ("image", "label")),
                )

            def _split_generators(self, dl_manager: Any) -> Any:
                starts = np.cumsum([0, *counts.values()])
                return {
                    split: self._generate_examples(range(start, start + count))
                    for (split, count), start in zip(counts.items(), starts[:-1], strict=True)
                }

            def _generate_examples(self, numbers: range) -> Any:
                for number in numbers:
                    png = io.BytesIO()
                    made[number].save(png, format="PNG")
                    label = number % 3 if number else changes.get("label", 0)
                    yield number, {"image": png.getvalue(), "label": label, "number": number}

        Shapes.name = name
        if register:
            tfds.core.registered._DATASET_REGISTRY[name] = Shapes
    return Shapes, made


def prepare(folder: Path, name: str = "shapes", **changes: Any) -> list[Image.Image]:
    """Prepares it as TFDS does; returns all its images."""
    builder, made = build(name, **changes)
    with quiet_tfds():
        builder(data_dir=folder).download_and_prepare(file_format="array_record")
    return made


@pytest.fixture(autouse=True)
def _temporary_folders(monkeypatch, tmp_path):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))  # TFDS leaves empty ones there


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def load(folder: Path, name: str = "shapes", **options: Any) -> Splits:
    return load_dataset(name, folder, **{"image_size": 28, **options})


def refused(folder: Path, name: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, name, **options)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 800
    return line


def test_a_prepared_set_is_read_by_its_name(folder, capfd, said):
    made = prepare(folder)
    capfd.readouterr()
    train, test, classes, fit, _ = load(folder)
    assert (classes, fit) == (CLASSES, "crop")
    assert (train.images.shape, test.images.shape) == ((12, 8, 8, 3), (6, 8, 8, 3))
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
    assert_same_images(train.images, made[:12])
    assert_same_images(test.images, made[12:])
    numbers = {image.tobytes(): number for number, image in enumerate(made)}
    for image, label in zip(train.images, train.labels, strict=True):
        assert numbers[image.tobytes()] % 3 == label
    assert "12 images to train on, 6 to test on; 8x8 pixels, coloured; 3 classes" in said[-1]
    assert capfd.readouterr() == ("", "")


def test_the_version_may_be_named(folder):
    prepare(folder)
    assert len(load(folder, "shapes:1.0.0").train) == 12
    assert "shapes:9.0.0" in refused(folder, "shapes:9.0.0")


def test_a_set_that_tfds_prepared_with_tensorflow(folder):
    prepare(folder)
    expected = load(folder)
    version = folder / "shapes" / "1.0.0"
    with quiet_tfds() as tfds:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        sources = tfds.builder("shapes", data_dir=folder).as_data_source(deserialize_method=raw)
    for split, source in sources.items():
        (shard,) = version.glob(f"*-{split}.*")
        records = [struct.pack("<QI", len(each), 0) + each + bytes(4) for each in source]
        shard.unlink()
        Path(str(shard).replace("array_record", "tfrecord")).write_bytes(b"".join(records))
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for found, wanted in zip(load(folder)[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(found.images, wanted.images)
        np.testing.assert_array_equal(found.labels, wanted.labels)
    (shard,) = version.glob("*-test.*")
    shard.write_bytes(b"".join(records[:-1]))
    assert f"cannot read {version}" in refused(folder, "shapes")


def test_grey_sets_have_one_channel(folder):
    made = prepare(folder, shape=(8, 8, 1))
    train, test, *_ = load(folder)
    assert (train.images.shape, test.images.shape) == ((12, 8, 8, 1), (6, 8, 8, 1))
    assert_same_images(train.images, made[:12])


def test_what_is_transparent_is_not_what_lies_under_it(folder):
    made = prepare(folder, shape=(8, 8, 4))
    train, *_ = load(folder)
    assert_same_images(train.images, [cropped(image, (8, 8)) for image in made[:12]])
    assert (train.images != [np.asarray(image)[..., :3] for image in made[:12]]).any()


def test_images_without_a_common_square_size_become_squares(folder):
    made = prepare(folder, shape=(None, None, 3))  # 12x12
    assert load(folder, image_size=28).train.images.shape == (12, 28, 28, 3)
    assert_same_images(load(folder, image_size=12).train.images, made[:12])


def test_larger_images_become_smaller(folder):
    made = prepare(folder, shape=(8, 8, 3))
    train, *_ = load(folder, image_size=4)
    assert_same_images(train.images, [image.resize((4, 4), 2) for image in made[:12]])


def test_without_a_test_set_the_validation_set_is_used(folder):
    made = prepare(folder, counts={"train": 9, "validation": 5})
    _, test, *_ = load(folder)
    assert_same_images(test.images, made[9:])


def test_without_either_the_training_set_is_split(folder, said):
    made = prepare(folder, counts={"train": 30})
    train, test, *_ = load(folder)
    assert (len(train), len(test)) == (24, 6)
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    assert_same_images(np.concatenate([train.images, test.images]), made)
    assert any("shapes has no test set of its own: 20% of each class" in line for line in said)


def test_labels_that_are_kept_secret(folder):
    prepare(folder, label=-1)
    assert "shapes: there are images without a label" in refused(folder, "shapes")


def test_a_set_that_has_no_labels(folder):
    prepare(folder, keys=None)
    assert "shapes is not a set of images by class: TFDS describes" in refused(folder, "shapes")
    prepare(folder, "numbers", keys=("image", "number"))
    assert "numbers is not a set of images by class" in refused(folder, "numbers")


def test_a_damaged_set_is_named(folder):
    prepare(folder)
    version = folder / "shapes" / "1.0.0"
    (shard,) = version.glob("*-test.*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert f"cannot read {version} (" in refused(folder, "shapes")


def test_an_unknown_name_brings_the_nearest(folder):
    line = refused(folder, "cifar1O")
    assert line.startswith(f"TFDS knows no data set cifar1O, and none is prepared in {folder}")
    assert line.endswith("did you mean cifar10?")


def test_without_tensorflow_one_line_says_how_to_supply_the_set(folder, capfd, said):
    assert importlib.util.find_spec("tensorflow") is None
    line = refused(folder, "cifar10")
    assert line.startswith(
        f"cifar10 is not in {folder}, and TFDS cannot prepare it here: TensorFlow"
    )
    assert "`tfds build cifar10 --file_format=array_record`" in line
    assert f"copy the folder cifar10 from ~/tensorflow_datasets into {folder}" in line
    assert said == [f"cifar10 is not in {folder}: TFDS downloads and prepares it"]
    assert not folder.exists()
    assert "No module named 'tensorflow'" in refused(folder, "coco")  # not even its description
    assert capfd.readouterr() == ("", "")


def test_without_a_network_the_same_line_comes_within_seconds(folder, monkeypatch):
    """TensorFlow is said to be there; TFDS would try for minutes to fetch the files."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tfds_sets.importlib.util, "find_spec", lambda name: find(name.replace("tensorflow", "json"))
    )
    asked = []

    def refuse(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(tfds_sets.urllib.request, "urlopen", refuse)
    assert "TFDS cannot prepare it here: timed out. To supply it, run" in refused(folder, "cifar10")
    assert asked == [("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 10)]


def test_what_tfds_can_prepare_it_prepares(folder, monkeypatch, capfd):
    monkeypatch.setattr(tfds_sets.importlib.util, "find_spec", lambda name: name)
    with quiet_tfds() as tfds:
        monkeypatch.setattr(tfds.core.registered, "_DATASET_REGISTRY", {})
    _, made = build("new_shapes", register=True)
    train, *_ = load(folder, "new_shapes")
    assert_same_images(train.images, made[:12])
    assert (folder / "new_shapes" / "1.0.0").is_dir()
    assert capfd.readouterr() == ("", "")


def test_tfds_is_silenced_only_while_it_is_used() -> None:
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    with quiet_tfds():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == logging.INFO
    logging.set_verbosity(before)


# --- Images that stay on the disk.


def assert_same(lazy: Any, resident: Any) -> None:
    assert isinstance(lazy.images, LazyImages)
    assert isinstance(resident.images, np.ndarray)
    np.testing.assert_array_equal(lazy.images[:], resident.images)
    np.testing.assert_array_equal(lazy.labels, resident.labels)
    assert lazy.labels.dtype == np.int32


@pytest.mark.parametrize("shape", [(20, 16, 3), (None, None, 3), (8, 8, 3), (12, 10, 4)])
@pytest.mark.parametrize("counts", [COUNTS, {"train": 30}, {"train": 9, "validation": 5}])
def test_from_the_disk_a_set_is_the_same_as_in_memory(folder, shape, counts):
    prepare(folder, shape=shape, counts=counts)
    lazy, resident = (load(folder, image_size=8, stream_above=above) for above in (0, math.inf))
    for part in range(2):
        assert_same(lazy[part], resident[part])
    assert lazy[2:] == resident[2:]
    assert_same(lazy.train.hold_out(5)[1].take(3), resident.train.hold_out(5)[1].take(3))


def test_a_pretrained_networks_resizing_is_followed_and_told(folder):
    made = prepare(folder, shape=(20, 16, 3))
    resizing = Resizing(9, squash=True, interpolation="bicubic")
    lazy, resident = (
        load(folder, image_size=8, resizing=resizing, stream_above=above) for above in (0, math.inf)
    )
    assert_same(lazy.train, resident.train)
    assert lazy.resizing == resident.resizing == resizing
    assert_same_images(resident.train.images, [resized(each, 8, resizing) for each in made[:12]])


def test_small_squares_are_small_and_do_not_stay_on_the_disk(folder):
    """CIFAR-10 at 224 pixels is 184 MB, not 9 GB: the training step makes them larger."""
    prepare(folder)
    above = 18 * 8 * 8 * 3
    for resizing in (None, Resizing(32)):
        data = load(folder, image_size=28, stream_above=above, resizing=resizing)
        assert data.train.images.shape == (12, 8, 8, 3)
        assert isinstance(data.train.images, np.ndarray)
        assert data.resizing is None
    assert isinstance(load(folder, stream_above=above - 1).train.images, LazyImages)


def test_labels_are_read_once_and_kept(folder, said, monkeypatch):
    prepare(folder)
    kept = folder / "shapes" / "1.0.0" / "labels.npy"
    expected = load(folder)
    assert not kept.exists()

    def labels() -> tuple[list[int], bool]:
        """And whether they were read from the records."""
        said.clear()
        data = load(folder, stream_above=0)
        return [*data.train.labels, *data.test.labels], any("labels" in line for line in said)

    wanted = [*expected.train.labels, *expected.test.labels]
    assert labels() == (wanted, True)
    assert labels() == (wanted, False)
    content = kept.read_bytes()
    np.save(kept, np.zeros(17, np.int32))
    other = kept.read_bytes()
    np.save(kept, np.zeros(18))
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object))
    for damaged in (b"", content[:50], content[:-4], b"PK\x03\x04", b"text", other,
                    kept.read_bytes(), objects.getvalue()):  # fmt: skip
        kept.write_bytes(damaged)
        assert labels() == (wanted, True)
        assert kept.read_bytes() == content
    kept.unlink()
    kept.mkdir()  # what cannot be written
    assert labels() == (wanted, True)
    assert sum(line.startswith("labels not kept: ") for line in said) == 1


def test_sets_that_cannot_be_read_in_any_order_are_refused(folder):
    prepare(folder)
    info = folder / "shapes" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    line = refused(folder, "shapes", stream_above=0)
    assert line.startswith(f"{info.parent} is too large for memory, and its tfrecord files cannot")
    assert line.endswith("prepare it with `--file_format=array_record`")


def test_records_travel_to_other_processes_after_they_were_read(folder):
    prepare(folder)
    images = load(folder, stream_above=0).train.images
    pixels = images[:]
    again = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < 2000
    np.testing.assert_array_equal(again[:], pixels)


def test_threads_that_decode_open_the_records_once(folder, monkeypatch):
    prepare(folder)
    images = load(folder, stream_above=0).train.images
    with quiet_tfds() as tfds:
        opened, open_once = [], tfds.builder_from_directory
    monkeypatch.setattr(
        tfds, "builder_from_directory", lambda path: opened.append(path) or open_once(path)
    )
    pickle.loads(pickle.dumps(images))[:]
    assert opened == [folder / "shapes" / "1.0.0"]


def test_records_that_are_damaged_on_the_disk_are_named(folder):
    prepare(folder, shape=(20, 20, 3))
    version = folder / "shapes" / "1.0.0"
    data = load(folder, stream_above=0, image_size=8)
    (shard,) = version.glob("*-test.*")
    content = shard.read_bytes()
    assert content.count(b"IHDR") == 6
    shard.write_bytes(content[: len(content) // 2])
    fresh = pickle.loads(pickle.dumps(data.test.images))
    with pytest.raises(InputError, match=f"^cannot read image 0 of test in {version} "):
        fresh[:]
    (version / "labels.npy").unlink()
    assert f"cannot read {version} (" in refused(folder, "shapes", stream_above=0)
