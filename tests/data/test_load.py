"""`--dataset`: TFDS' sets and folders, their splits, and what is said when there is none."""

import importlib.util
import io
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import load as datasets
from resnet_flax.data.fashion_mnist import FASHION_MNIST_CLASSES
from resnet_flax.data.load import load_dataset, stratified_split
from resnet_flax.data.tfds import quiet_tfds
from resnet_flax.errors import InputError
from tests.support.image_files import random_image, write_classes

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
    mode = "L" if shape[2] == 1 else "RGB"
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
def pets(tmp_path):
    return tmp_path / "pets"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def load(folder: Path, name: str = "shapes", **options: Any) -> datasets.Splits:
    return load_dataset(name, folder, **{"image_size": 28, **options})


def refused(folder: Path, name: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, name, **options)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 800
    return line


def assert_same_images(found: np.ndarray, expected: list[Image.Image]) -> None:
    """In whatever order."""
    arrays = [np.asarray(image).reshape(found.shape[1:]) for image in expected]
    assert sorted(each.tobytes() for each in found) == sorted(each.tobytes() for each in arrays)


# --- TFDS' sets.


def test_a_prepared_set_is_read_by_its_name(folder, capfd):
    made = prepare(folder)
    capfd.readouterr()
    said: list[str] = []
    train, test, classes = load(folder, report=said.append)
    assert classes == CLASSES
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
    train, test, _ = load(folder)
    assert (train.images.shape, test.images.shape) == ((12, 8, 8, 1), (6, 8, 8, 1))
    assert_same_images(train.images, made[:12])


def test_images_without_a_common_square_size_become_squares(folder):
    made = prepare(folder, shape=(None, None, 3))  # 12x12
    assert load(folder, image_size=28).train.images.shape == (12, 28, 28, 3)
    assert_same_images(load(folder, image_size=12).train.images, made[:12])


def test_larger_images_become_smaller(folder):
    made = prepare(folder, shape=(8, 8, 3))
    train, _, _ = load(folder, image_size=4)
    assert_same_images(train.images, [image.resize((4, 4), 2) for image in made[:12]])


def test_without_a_test_set_the_validation_set_is_used(folder):
    made = prepare(folder, counts={"train": 9, "validation": 5})
    _, test, _ = load(folder)
    assert_same_images(test.images, made[9:])


def test_without_either_the_training_set_is_split(folder):
    made = prepare(folder, counts={"train": 30})
    said: list[str] = []
    train, test, _ = load(folder, report=said.append)
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


@pytest.mark.parametrize(
    "name", ["", "../shapes", "/tmp", "a b", "huggingface:mnist", "shapes:*.*.*", "folders:x", "\n"]
)
def test_other_names_are_refused_at_once(folder, name):
    assert "is neither fashion_mnist, nor a name of TFDS' such as" in refused(folder, name)


def test_without_tensorflow_one_line_says_how_to_supply_the_set(folder, capfd):
    assert importlib.util.find_spec("tensorflow") is None
    said: list[str] = []
    line = refused(folder, "cifar10", report=said.append)
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
        datasets.importlib.util, "find_spec", lambda name: find(name.replace("tensorflow", "json"))
    )
    asked = []

    def refuse(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", refuse)
    assert "TFDS cannot prepare it here: timed out. To supply it, run" in refused(folder, "cifar10")
    assert asked == [("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 10)]


def test_what_tfds_can_prepare_it_prepares(folder, monkeypatch, capfd):
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: name)
    with quiet_tfds() as tfds:
        monkeypatch.setattr(tfds.core.registered, "_DATASET_REGISTRY", {})
    _, made = build("new_shapes", register=True)
    train, _, _ = load(folder, "new_shapes")
    assert_same_images(train.images, made[:12])
    assert (folder / "new_shapes" / "1.0.0").is_dir()
    assert capfd.readouterr() == ("", "")


# --- Folders.


def test_fashion_mnist_stays_what_it_was(fashion_mnist):
    train, test, classes = load_dataset("fashion_mnist", image_size=28)
    assert classes == FASHION_MNIST_CLASSES
    for found, wanted in zip((train, test), fashion_mnist, strict=True):
        np.testing.assert_array_equal(found.images, wanted.images)


def test_a_folder_is_split_within_each_class(pets):
    write_classes(pets, count=20)
    said: list[str] = []
    train, test, classes = load(pets, f"folder:{pets}", report=said.append)
    assert classes == ("cats", "dogs")
    assert np.bincount(train.labels).tolist() == [16, 16]
    assert np.bincount(test.labels).tolist() == [4, 4]
    everything = [Image.open(path) for path in pets.rglob("*.png")]
    assert_same_images(np.concatenate([train.images, test.images]), everything)
    assert said[0] == (
        f"{pets} has no test set of its own: 20% of each class, drawn with seed 0, are "
        "kept out of training for it"
    )
    assert 0 < train.labels[:8].sum() < 8  # the first ones are of both classes


def test_the_seed_decides_the_split(pets):
    write_classes(pets, count=10)
    first, again, other = (load(pets, f"folder:{pets}", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.test.images, again.test.images)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert {each.tobytes() for each in first.test.images} != {
        each.tobytes() for each in other.test.images
    }


def test_a_folder_with_both_parts_is_not_split(pets):
    write_classes(pets / "train", count=7)
    write_classes(pets / "test", count=3)
    said: list[str] = []
    train, test, _ = load(pets, f"folder:{pets}", report=said.append)
    assert_same_images(train.images, [Image.open(p) for p in (pets / "train").rglob("*.png")])
    assert_same_images(test.images, [Image.open(p) for p in (pets / "test").rglob("*.png")])
    numbers = {Image.open(p).tobytes(): p.parent.name for p in pets.rglob("*.png")}
    for image, label in zip(train.images, train.labels, strict=True):
        assert numbers[image.tobytes()] == ("cats", "dogs")[label]
    assert not any("no test set" in line for line in said)


def test_folders_that_cannot_be_split(pets):
    assert refused(pets, "folder:") == "--dataset folder:PATH needs the folder's path"
    write_classes(pets, count=1)
    line = refused(pets, f"folder:{pets}")
    assert line == "the class cats has 1 image, too few to train and to test on"


@pytest.mark.parametrize(("count", "tested"), [(2, 1), (4, 1), (5, 1), (8, 2), (100, 20)])
def test_every_class_has_its_share(count, tested):
    labels = np.repeat(np.arange(3), count)
    train, test = stratified_split(labels, ("a", "b", "c"), seed=0)
    assert sorted([*train, *test]) == list(range(3 * count))
    assert np.bincount(labels[test]).tolist() == [tested] * 3
