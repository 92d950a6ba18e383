"""Folders of images: what is read, and a line for everything that is wrong with them."""

import os
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import folder as image_folder
from resnet_flax.data.folder import find_images, read_images
from resnet_flax.errors import InputError
from resnet_flax.nn.preprocessing import resize
from tests.support.image_files import random_image, write_classes


def refused(folder: Path, largest: int = 8) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(InputError) as caught:
        read_images(find_images(folder, report=lambda line: None).paths, largest)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 600
    return line


def read_one(
    image: Image.Image, folder: Path, name: str = "x.png", largest: int = 8, **save: object
):
    image.save(folder / name, **save)
    return read_images([folder / name], largest)[0]


# --- What is found.


def test_classes_are_the_folders_in_the_order_of_their_names(tmp_path):
    write_classes(tmp_path, ("dogs", "cats", "Ants"), count=2)
    files = find_images(tmp_path, report=pytest.fail)
    assert files.classes == ("Ants", "cats", "dogs")
    assert files.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert files.labels.dtype == np.int32
    assert [path.parent.name for path in files.paths] == [files.classes[i] for i in files.labels]
    assert files.num_train is None


def test_train_and_test_are_told_apart(tmp_path):
    write_classes(tmp_path / "train", count=3)
    write_classes(tmp_path / "test", count=2)
    files = find_images(tmp_path, report=pytest.fail)
    assert (files.num_train, files.labels.tolist()) == (6, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1])
    assert {path.parts[-3] for path in files.paths[:6]} == {"train"}
    assert {path.parts[-3] for path in files.paths[6:]} == {"test"}


def test_all_three_endings_count_and_other_files_are_told(tmp_path):
    write_classes(tmp_path, count=1)
    for name in ("a.JPG", "b.jpeg", "c.PNG"):
        random_image(0).save(tmp_path / "cats" / name)
    (tmp_path / "cats" / ".hidden.png").write_text("")
    (tmp_path / ".git").mkdir()
    for name in ("notes.txt", "d.gif", "e.bmp", "f.tif"):
        (tmp_path / "dogs" / name).write_text("")
    os.mkfifo(tmp_path / "dogs" / "pipe.png")  # reading it would wait for ever
    said = []
    files = find_images(tmp_path, said.append)
    assert [path.name for path in files.paths] == ["00.png", "a.JPG", "b.jpeg", "c.PNG", "00.png"]
    assert len(said) == 1
    assert "left out, being no images (.png, .jpg, .jpeg): " in said[0]
    assert said[0].endswith(
        "d.gif, " + str(tmp_path / "dogs/e.bmp, ") + str(tmp_path / "dogs/f.tif and 2 more")
    )


# --- What is read.


def test_squares_of_one_size_are_kept_to_the_bit(tmp_path):
    files = find_images(write_classes(tmp_path), report=pytest.fail)
    images = read_images(files.paths, largest=28)
    assert (images.shape, images.dtype) == ((10, 8, 8, 3), np.uint8)
    for path, image in zip(files.paths, images, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)))


def test_larger_squares_become_what_the_training_step_would_make_of_them(tmp_path):
    files = find_images(write_classes(tmp_path, size=(20, 20)), report=pytest.fail)
    whole, small = read_images(files.paths, 20), read_images(files.paths, 7)
    np.testing.assert_array_equal(small, resize(whole, 7))


def test_differing_sizes_become_the_middle_of_each(tmp_path):
    wide, tall = random_image(1, (28, 20)), random_image(2, (10, 16))
    for name, image in {"wide": wide, "tall": tall}.items():
        image.save(tmp_path / f"{name}.png")
    images = read_images([tmp_path / "wide.png", tmp_path / "tall.png"], 10)
    expected = [wide.resize((14, 10), 2).crop((2, 0, 12, 10)), tall.crop((0, 3, 10, 13))]
    np.testing.assert_array_equal(images, np.stack([np.asarray(each) for each in expected]))


def test_grey_images_have_one_channel_however_they_are_stored(tmp_path):
    grey = random_image(0, mode="L")
    for mode in ("L", "LA", "RGB", "P", "1"):
        image = read_one(grey.convert(mode), tmp_path)
        assert image.shape == (8, 8, 1), mode
        np.testing.assert_array_equal(image[..., 0], np.asarray(grey.convert(mode).convert("L")))


def test_one_coloured_image_makes_all_coloured(tmp_path):
    random_image(0, mode="L").save(tmp_path / "0.png")
    random_image(1).save(tmp_path / "1.png")
    images = read_images([tmp_path / "0.png", tmp_path / "1.png"], 8)
    assert images.shape == (2, 8, 8, 3)
    assert (images[0] == images[0, ..., :1]).all()


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    image = read_one(Image.fromarray(deep), tmp_path)
    np.testing.assert_array_equal(image[..., 0], deep >> 8)


def test_transparency_is_ignored(tmp_path):
    colours = random_image(0, mode="RGBA")
    expected = np.asarray(colours)[..., :3]
    np.testing.assert_array_equal(read_one(colours, tmp_path), expected)
    palette = random_image(0).quantize(16)
    image = read_one(palette, tmp_path, transparency=bytes(range(16)))
    np.testing.assert_array_equal(image, np.asarray(palette.convert("RGB")))


def test_other_modes_of_jpeg(tmp_path):
    image = read_one(random_image(0, mode="RGB").convert("CMYK"), tmp_path, "x.jpg")
    assert image.shape == (8, 8, 3)


def test_a_camera_held_upright_is_believed(tmp_path):
    upright = Image.new("RGB", (8, 8))
    upright.paste((255, 0, 0), (0, 0, 8, 4))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    image = read_one(
        upright.transpose(Image.Transpose.ROTATE_90), tmp_path, "x.jpg", exif=exif, quality=100
    )
    assert image[1, :, 0].min() > 200
    assert image[6, :, 0].max() < 50


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
    assert refused(tmp_path) == f"no image in {tmp_path / 'mice'} (.png, .jpg, .jpeg)"


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a PNG or JPEG image"),
        (b"no image", "not a PNG or JPEG image"),
        ("truncated", "truncated"),
        ("gif", "not a PNG or JPEG image"),
        ("bit flipped", "broken"),
    ],
)
def test_broken_images_are_named(tmp_path, content, reason):
    write_classes(tmp_path)
    path = tmp_path / "cats" / "02.png"
    good = path.read_bytes()
    if content == "truncated":
        random_image(0, (100, 100)).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "gif":
        random_image(0).save(path, format="GIF")
    elif content == "bit flipped":
        middle = good.index(b"IDAT") + 10
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    else:
        path.write_bytes(content)
    line = refused(tmp_path)
    assert f"cannot read {path} (" in line
    assert reason in line
    assert line.endswith("mend or remove what is broken")


def test_many_broken_images_make_one_line(tmp_path):
    write_classes(tmp_path)
    for path in (tmp_path / "cats").iterdir():
        path.write_bytes(b"")
    assert " and 2 more: mend or remove" in refused(tmp_path)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    write_classes(tmp_path)
    path = tmp_path / "cats" / "02.png"
    for side in (10_000, 100_000):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        chunk = len(header[4:]).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + bytes(4) + b"IDAT" + bytes(4))
        assert f"{path} (more than 89,478,485 pixels)" in refused(tmp_path)


def test_more_images_than_memory(tmp_path, monkeypatch):
    write_classes(tmp_path)
    pages = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr(image_folder.os, "sysconf", pages.get)
    assert "10 images of 8x8 pixels take" in refused(tmp_path)


def test_warnings_of_pillow_do_not_reach_the_user(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        palette = random_image(0).quantize(16)
        read_one(palette, tmp_path, transparency=bytes(range(16)))
    assert not [each for each in caught if "ransparency" in str(each.message)]


# --- Links.


@pytest.fixture
def outside(tmp_path):
    return write_classes(tmp_path / "outside", ("mice",))


@pytest.fixture
def root(tmp_path):
    return write_classes(tmp_path / "root")


def test_links_within_the_folder_are_followed(root, tmp_path):
    (root / "cats" / "link.png").symlink_to(root / "dogs" / "00.png")
    (root / "mice").symlink_to("cats")
    (tmp_path / "link").symlink_to(root)  # the user's own name for it
    files = find_images(tmp_path / "link", report=pytest.fail)
    assert (files.classes, len(files.paths)) == (("cats", "dogs", "mice"), 17)


def test_links_out_of_the_folder_are_refused(root, outside):
    link = root / "cats" / "link.png"
    link.symlink_to(outside / "mice" / "00.png")
    assert refused(root) == f"{link} is a link out of the folder: put a copy in its place"
    link.unlink()
    (root / "mice").symlink_to(outside / "mice")
    assert refused(root) == f"{root / 'mice'} is a link out of the folder: put a copy in its place"
    (root / "mice").unlink()
    shutil.move(root, root.with_name("train"))
    root.mkdir()
    shutil.move(root.with_name("train"), root / "train")
    (root / "test").symlink_to(outside)
    assert refused(root) == f"{root / 'test'} is a link out of the folder: put a copy in its place"


def test_links_to_nowhere_and_in_circles(root):
    link = root / "cats" / "link.png"
    link.symlink_to("absent.png")
    assert "No such file or directory" in refused(root)
    link.unlink()
    link.symlink_to("link.png")
    assert "cannot read the images in" in refused(root)
