"""Folders of images: what is read, and a line for everything that is wrong with them."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnet_flax.data import load_dataset
from resnet_flax.data.folder import find_images
from resnet_flax.errors import InputError
from tests.support.image_files import assert_same_images, random_image, refused, write_classes


@pytest.fixture
def pets(tmp_path):
    return tmp_path / "pets"


def load(folder, **options):
    return load_dataset(f"folder:{folder}", image_size=28, **options)


# --- What is found.


def test_classes_are_the_folders_in_the_order_of_their_names(tmp_path, said):
    write_classes(tmp_path, ("dogs", "cats", "Ants"), count=2)
    files = find_images(tmp_path)
    assert files.classes == ("Ants", "cats", "dogs")
    assert files.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert files.labels.dtype == np.int32
    assert [path.parent.name for path in files.paths] == [files.classes[i] for i in files.labels]
    assert files.num_train is None
    assert said == []


def test_train_and_test_are_told_apart(tmp_path, said):
    write_classes(tmp_path / "train", count=3)
    write_classes(tmp_path / "test", count=2)
    files = find_images(tmp_path)
    assert (files.num_train, files.labels.tolist()) == (6, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1])
    assert {path.parts[-3] for path in files.paths[:6]} == {"train"}
    assert {path.parts[-3] for path in files.paths[6:]} == {"test"}
    assert said == []


def test_all_three_endings_count_and_other_files_are_told(tmp_path, said):
    write_classes(tmp_path, count=1)
    for name in ("a.JPG", "b.jpeg", "c.PNG"):
        random_image(0).save(tmp_path / "cats" / name)
    (tmp_path / "cats" / ".hidden.png").write_text("")
    (tmp_path / ".git").mkdir()
    for name in ("notes.txt", "d.gif", "e.bmp", "f.tif"):
        (tmp_path / "dogs" / name).write_text("")
    os.mkfifo(tmp_path / "dogs" / "pipe.png")  # reading it would wait for ever
    files = find_images(tmp_path)
    assert [path.name for path in files.paths] == ["00.png", "a.JPG", "b.jpeg", "c.PNG", "00.png"]
    assert len(said) == 1
    assert "left out, being no images (.png, .jpg, .jpeg, .jfif): " in said[0]
    assert said[0].endswith(
        "d.gif, " + str(tmp_path / "dogs/e.bmp, ") + str(tmp_path / "dogs/f.tif and 2 more")
    )


@pytest.mark.parametrize("name", ["__MACOSX", "$RECYCLE.BIN", "__pycache__", "@eaDir", ".git"])
def test_what_systems_leave_behind_is_passed_over(tmp_path, said, name):
    write_classes(tmp_path)
    (tmp_path / "cats" / name).mkdir()
    (tmp_path / name / "cats").mkdir(parents=True)
    (tmp_path / name / "cats" / "._00.png").write_text("Mac OS X")
    files = find_images(tmp_path)
    assert (files.classes, len(files.paths)) == (("cats", "dogs"), 10)
    assert said == []


@pytest.mark.parametrize(
    "classes", [("bus", "car", "train"), ("test", "train"), ("train", "val"), ("exam", "test")]
)
def test_a_class_may_be_called_as_a_split(tmp_path, classes):
    write_classes(tmp_path, classes)
    files = find_images(tmp_path)
    assert (files.classes, files.num_train) == (classes, None)


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_the_names_of_what_is_tested_on(tmp_path, said, name):
    write_classes(tmp_path / "train", count=3)
    write_classes(tmp_path / name, count=2)
    files = find_images(tmp_path)
    assert files.num_train == 6
    assert {path.parts[-3] for path in files.paths[6:]} == {name}
    assert said == []


def test_of_several_to_test_on_one_is_taken_and_told(tmp_path, said):
    for name in ("train", "test", "val"):
        write_classes(tmp_path / name)
    assert {path.parts[-3] for path in find_images(tmp_path).paths} == {"train", "test"}
    assert said == [f"{tmp_path}: tested on test; left out: val"]


# --- What is refused.


def test_a_folder_that_is_none(tmp_path):
    assert refused(tmp_path / "absent").endswith("absent: No such file or directory")
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file").endswith("file: Not a directory")
    assert "holds no folders: it needs one for each class, CLASS/*.png" in refused(tmp_path)


def test_one_class_only(tmp_path):
    write_classes(tmp_path, ("cats",))
    assert refused(tmp_path).endswith("holds one class only, cats: two at least are needed")


def test_an_empty_class(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "mice").mkdir()
    assert refused(tmp_path) == f"no image in {tmp_path / 'mice'} (.png, .jpg, .jpeg, .jfif)"


def test_a_folder_around_the_folder(tmp_path):
    write_classes(tmp_path / "pets")
    assert refused(tmp_path).endswith(f"to use the folders in it as classes, name {tmp_path}/pets")


@pytest.mark.parametrize(("present", "missing"), [("train", "test"), ("test", "train")])
def test_half_a_split(tmp_path, present, missing):
    write_classes(tmp_path / present)
    assert f"holds {present} but no {missing}: add that folder" in refused(tmp_path)


@pytest.mark.parametrize(("more", "less"), [("train", "test"), ("test", "train")])
def test_splits_that_differ_in_their_classes(tmp_path, more, less):
    write_classes(tmp_path / more, ("cats", "dogs", "mice"))
    write_classes(tmp_path / less)
    line = refused(tmp_path)
    assert line == f"{tmp_path / less} lacks a folder mice, which {tmp_path / more} has"


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2J", "a" * 101])
def test_names_that_cannot_be_printed(tmp_path, name):
    write_classes(tmp_path, (name, "dogs"))
    assert refused(tmp_path).startswith("rename the folder '")


# --- What is loaded.


def test_a_folder_is_split_within_each_class(pets, said):
    write_classes(pets, count=20)
    train, test, classes, fit, _ = load(pets)
    assert (classes, fit) == (("cats", "dogs"), "crop")
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
    first, again, other = (load(pets, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.test.images, again.test.images)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert {each.tobytes() for each in first.test.images} != {
        each.tobytes() for each in other.test.images
    }


def test_a_folder_with_both_parts_is_not_split(pets, said):
    write_classes(pets / "train", count=7)
    write_classes(pets / "test", count=3)
    train, test, *_ = load(pets)
    assert_same_images(train.images, [Image.open(p) for p in (pets / "train").rglob("*.png")])
    assert_same_images(test.images, [Image.open(p) for p in (pets / "test").rglob("*.png")])
    numbers = {Image.open(p).tobytes(): p.parent.name for p in pets.rglob("*.png")}
    for image, label in zip(train.images, train.labels, strict=True):
        assert numbers[image.tobytes()] == ("cats", "dogs")[label]
    assert not any("no test set" in line for line in said)


def test_folders_that_cannot_be_split(pets):
    with pytest.raises(InputError, match=r"^dataset folder:PATH needs the folder's path$"):
        load("")
    write_classes(pets, count=1)
    line = "^the class cats has 1 image, too few to train and to test on$"
    with pytest.raises(InputError, match=line):
        load(pets)


# --- Links.


@pytest.fixture
def outside(tmp_path):
    return write_classes(tmp_path / "outside", ("mice",))


@pytest.fixture
def root(tmp_path):
    return write_classes(tmp_path / "root")


def test_links_within_the_folder_are_followed(root, tmp_path, said):
    (root / "cats" / "link.png").symlink_to(root / "dogs" / "00.png")
    (root / "mice").symlink_to("cats")
    (tmp_path / "link").symlink_to(root)  # the user's own name for it
    files = find_images(tmp_path / "link")
    assert (files.classes, len(files.paths)) == (("cats", "dogs", "mice"), 17)
    assert said == []


def test_links_out_of_the_folder_are_refused(root, outside):
    link = root / "cats" / "link.png"
    link.symlink_to(outside / "mice" / "00.png")
    mend = "is a link out of the folder: put a copy in its place, or allow it by `follow_links`"
    assert refused(root) == f"{link} {mend}"
    link.unlink()
    (root / "mice").symlink_to(outside / "mice")
    assert refused(root) == f"{root / 'mice'} {mend}"
    (root / "mice").unlink()
    shutil.move(root, root.with_name("train"))
    root.mkdir()
    shutil.move(root.with_name("train"), root / "train")
    (root / "test").symlink_to(outside)
    assert refused(root) == f"{root / 'test'} {mend}"


def test_links_out_of_the_folder_are_followed_when_asked(root, outside):
    (root / "cats" / "link.png").symlink_to(outside / "mice" / "00.png")
    (root / "mice").symlink_to(outside / "mice")
    files = find_images(root, follow_links=True)
    assert (files.classes, len(files.paths)) == (("cats", "dogs", "mice"), 16)
    assert len(load(root, follow_links=True).train) == 13


def test_links_to_nowhere_and_in_circles(root):
    link = root / "cats" / "link.png"
    link.symlink_to("absent.png")
    line = f"{link} is a link to absent.png (No such file or directory): mend or remove it"
    assert refused(root) == line
    with pytest.raises(InputError, match=r"is a link to absent\.png"):
        find_images(root, follow_links=True)
    link.unlink()
    link.symlink_to("link.png")
    assert refused(root).startswith(f"{link} is a link to link.png (")


# --- As public reports have it: the report, the files, and the classes or the line.

ACCENTED = "caf\u00e9"
APART = "cafe\u0301"  # the same to the eye, as macOS writes it


def write(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = random_image(seed)
        image.save(folder / name, "PNG")


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        pytest.param(
            [f"train/{ACCENTED}/1.png", "train/b/1.png", f"test/{APART}/1.png", "test/b/1.png"],
            ("b", ACCENTED),
            id="llmsresearch/paperbanana#234",
        ),
        pytest.param(
            ["a/1.JPG", "a/2.JPEG", "b/1.PNG"], ("a", "b"), id="open-edge-platform/anomalib#3058"
        ),
        pytest.param(["a/1.jfif", "b/1.JFIF"], ("a", "b"), id="upscayl/upscayl#983"),
        pytest.param(
            ["0/1.png", "2/1.png", "10/1.png"],
            ("0", "10", "2"),  # an answer is a class's name
            id="deeplearning4j/deeplearning4j#3859",
        ),
    ],
)
def test_folders_that_were_reported_elsewhere_are_read(names, classes, tmp_path, said):
    write(tmp_path, *names)
    files = find_images(tmp_path)
    assert (files.classes, len(files.paths), said) == (classes, len(names), [])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        pytest.param(
            ["train/a/1.png", "train/b/1.png", "test/1.png"],
            "{}/test holds images, but no folders by class: sort them into such, or name {}/train "
            "to have it split",
            id="fastai/fastai#1552",
        ),
        pytest.param(
            [f"{ACCENTED}/1.png", f"{APART}/2.png"],
            f"{{}} holds two folders {ACCENTED}, spelt differently in Unicode: join them",
            id="doublecmd/doublecmd#2747",
        ),
        pytest.param(
            ["train/0/1.png", "train/180/1.png", "train/90/1.png", "val/0/1.png", "val/90/1.png"],
            "{}/val lacks a folder 180, which {}/train has",
            id="ultralytics/ultralytics#13936",
        ),
        pytest.param(
            ["a/abbey/1.png", "a/airfield/1.png", "b/bar/1.png"],
            "no image in {}/a (.png, .jpg, .jpeg, .jfif); to use the folders in it as classes, "
            "name {}/a",
            id="pytorch/vision#2605",
        ),
    ],
)
def test_folders_that_were_reported_elsewhere_are_refused(names, told, tmp_path):
    write(tmp_path, *names)
    assert refused(tmp_path) == told.replace("{}", str(tmp_path))


@pytest.mark.parametrize("follow_links", [False, True])
def test_a_link_to_a_folder_above_ends(follow_links, tmp_path, said):
    """andhus/dirhash-python#31, nanoporetech/ont_fast5_api#25."""
    write(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "up").symlink_to("..")
    assert len(find_images(tmp_path, follow_links).paths) == 2
    (tmp_path / "a" / "self").symlink_to("self")
    with pytest.raises(InputError, match=r"self \(Too many levels.*\): mend or remove it$"):
        find_images(tmp_path, follow_links)


# --- What cannot be read.


@pytest.mark.parametrize("split", [False, True])
def test_what_is_broken_is_left_out_of_images_labels_and_parts(split, pets, said):
    parts = ("train", "test") if split else (".",)
    for part in parts:
        write_classes(pets / part, count=10)
    for path in (pets / "test").rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    whole = load(pets)
    numbers = {Image.open(path).tobytes(): path for path in pets.rglob("*.png")}
    paths = [[numbers[image.tobytes()] for image in each.images] for each in whole[:2]]
    broken = [paths[0][0], paths[0][-1], paths[1][0]]
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=f"^cannot read 3 of {len(numbers)} images: "):
        load(pets)
    said.clear()
    found = load(pets, skip_broken=True)
    assert [len(part) for part in found[:2]] == [len(paths[0]) - 2, len(paths[1]) - 1]
    for part, before, names in zip(found[:2], whole[:2], paths, strict=True):
        kept = [path not in broken for path in names]
        np.testing.assert_array_equal(part.images, before.images[kept])
        np.testing.assert_array_equal(part.labels, before.labels[kept])
    (line,) = [line for line in said if "passed over" in line]
    assert line.startswith(f"passed over 3 of {len(numbers)} images: {broken[0]} (")
    assert found.classes == whole.classes


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_of_which_nothing_can_be_read_is_refused(part, pets):
    for each in ("train", "test"):
        write_classes(pets / each)
    for path in (pets / part).rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=f"pets: no image to {part} on can be read$"):
        load(pets, skip_broken=True)


def test_if_nothing_can_be_read_it_is_named(pets):
    for path in write_classes(pets).rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"^cannot read 10 of 10 images: .* and 7 more: mend or"):
        load(pets, skip_broken=True)
