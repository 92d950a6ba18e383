"""`resnet_flax.data.image_files`: files of every kind, to train on and to predict from."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnet_flax.data import bright_border, image_files, read_photos
from resnet_flax.data.folder import find_images
from resnet_flax.data.image_files import Photo
from resnet_flax.errors import InputError
from resnet_flax.nn.preprocessing import resize
from tests.support.finished_run import random_images
from tests.support.image_files import natural_image, random_image, refused, write_classes

# --- To train on.


def read_images(paths, largest):
    return image_files.read_images(paths, largest)[0]


def read_one(
    image: Image.Image, folder: Path, name: str = "x.png", largest: int = 8, **save: object
):
    image.save(folder / name, **save)
    return read_images([folder / name], largest)[0]


def test_squares_of_one_size_are_kept_to_the_bit(tmp_path):
    files = find_images(write_classes(tmp_path))
    images = read_images(files.paths, largest=28)
    assert (images.shape, images.dtype) == ((10, 8, 8, 3), np.uint8)
    for path, image in zip(files.paths, images, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)))


def test_larger_squares_become_what_the_training_step_would_make_of_them(tmp_path):
    files = find_images(write_classes(tmp_path, size=(20, 20)))
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


def over(ground: str, image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return np.asarray(whole.convert("RGB"))


@pytest.mark.parametrize(("colour", "ground"), [(200, "black"), (60, "white")])
def test_what_is_transparent_becomes_the_ground_that_the_thing_stands_out_from(
    colour, ground, tmp_path
):
    colours = random_image(0, mode="RGBA")
    colours.paste((colour, colour, colour, 255), (0, 0, 8, 5))
    np.testing.assert_array_equal(read_one(colours, tmp_path), over(ground, colours))
    grey = colours.convert("LA")
    np.testing.assert_array_equal(read_one(grey, tmp_path), over(ground, grey)[..., :1])
    palette = colours.convert("RGB").quantize(16)
    palette.info["transparency"] = bytes(range(0, 240, 15))
    palette.save(tmp_path / "palette.png")
    found = read_images([tmp_path / "palette.png"], 8)[0]
    np.testing.assert_array_equal(found, over("white", palette))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_drawn_in_the_alpha_channel_alone_is_seen(mode, tmp_path):
    """As icons are: black all over, and opaque where the thing is."""
    thing = random_image(0, mode="L")
    image = Image.new("L", (8, 8)).convert(mode)
    image.putalpha(thing)
    found = read_one(image, tmp_path)
    np.testing.assert_array_equal(found[..., 0], 255 - np.asarray(thing))
    (photo,) = read_photos([tmp_path / "x.png"], (8, 8, 1), fit="pad", dark_background=False)
    np.testing.assert_array_equal(photo.pixels, found)


def test_training_and_predicting_see_the_same_in_icons(tmp_path):
    for number in range(4):
        shape = random_image(number, mode="L")
        Image.merge("RGBA", [*[Image.new("L", (8, 8))] * 3, shape]).save(tmp_path / f"{number}.png")
    paths = sorted(tmp_path.iterdir())
    trained = read_images(paths, 8)
    assert len({image.tobytes() for image in trained}) == 4
    photos = read_photos(paths, (8, 8, 1), fit="crop", dark_background=False)
    np.testing.assert_array_equal([photo.pixels for photo in photos], trained)


def test_opaque_pictures_with_an_alpha_channel_are_what_they_are_without(tmp_path):
    colours = random_image(0)
    np.testing.assert_array_equal(read_one(colours.convert("RGBA"), tmp_path), np.asarray(colours))


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


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Entries of (tag, type, count, value)."""
    packed = [struct.pack("<HHI4s", *entry) for entry in entries]
    return struct.pack("<4sIH", b"II*", 8, len(entries)) + b"".join(packed) + bytes(4)


TURNED = (0x0112, 3, 1, b"\x06")  # to be seen turned by 90 degrees
METADATA = {
    "no TIFF": (b"\0\x08\0\0 and more", False),
    "too short": (exif(TURNED)[:16], False),
    "an orientation in letters": (exif((0x0112, 2, 2, b"6")), False),
    "an orientation that is none": (exif((0x0112, 3, 1, b"\x63")), False),
    "an offset out of the file": (exif(TURNED, (0x010F, 2, 99, b"\xff\xff\xff\x7f")), True),
    "an unknown type": (exif(TURNED, (0x010F, 99, 1, b"abcd")), True),
    "a negative width": (exif(TURNED, (0x0100, 9, 1, b"\xff\xff\xff\xff")), True),
    "a block of letters": (exif(TURNED, (0x8769, 2, 1, b"abcd")), True),
}


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("kind", METADATA)
def test_a_picture_with_damaged_metadata_is_read(kind, ending, tmp_path):
    content, turned = METADATA[kind]
    image = random_image(0, (8, 8))
    more = {"exif": content if ending == "png" else b"Exif\0\0" + content}
    path = tmp_path / f"x.{ending}"
    image.save(path)
    expected = np.asarray(Image.open(path))
    image.save(path, **more)
    (found,) = read_images([path], 8)
    np.testing.assert_array_equal(found, np.rot90(expected, -1) if turned else expected)
    (photo,) = read_photos([path], (8, 8, 3), fit="pad", dark_background=False)
    np.testing.assert_array_equal(photo.pixels, found)


@pytest.mark.parametrize("number", range(1, 9))
def test_all_orientations_are_those_of_pillow(number, tmp_path):
    image = random_image(0, (9, 6))
    image.save(tmp_path / "x.png", exif=exif((0x0112, 3, 1, bytes([number]))))
    with Image.open(tmp_path / "x.png") as opened:
        expected = ImageOps.fit(ImageOps.exif_transpose(opened), (4, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read_images([tmp_path / "x.png"], 4)[0], np.asarray(expected))


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
    assert line.startswith(f"cannot read 1 of 10 images: {path} (")
    assert reason in line
    assert line.endswith("mend or remove what is broken")


def test_many_broken_images_make_one_line(tmp_path):
    write_classes(tmp_path)
    for path in (tmp_path / "cats").iterdir():
        path.write_bytes(b"")
    line = refused(tmp_path)
    assert line.startswith("cannot read 5 of 10 images: ")
    assert " and 2 more: mend or remove" in line


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    write_classes(tmp_path)
    path = tmp_path / "cats" / "02.png"
    for side in (10_000, 100_000):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        chunk = len(header[4:]).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + bytes(4) + b"IDAT" + bytes(4))
        line = refused(tmp_path)
        assert f"{path} (" in line
        assert "more than 89,478,485" in line


def test_more_images_than_memory(tmp_path, monkeypatch):
    write_classes(tmp_path)
    monkeypatch.setattr(image_files, "machine_memory", lambda: 1000)
    assert "10 images of 8x8 pixels take" in refused(tmp_path)


def test_warnings_of_pillow_do_not_reach_the_user(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        palette = random_image(0).quantize(16)
        read_one(palette, tmp_path, transparency=bytes(range(16)))
        Image.new("1", (9000, 9950)).save(tmp_path / "large.png")  # Pillow would warn of it
        with pytest.raises(InputError, match="9000x9950 pixels, more than"):
            read_images([tmp_path / "large.png"], 8)
    assert not [each for each in caught if "ransparency" in str(each.message)]


def test_names_in_messages_steer_no_terminal(tmp_path):
    (tmp_path / "\x1b[31m\n.png").write_text("")
    with pytest.raises(InputError) as caught:
        read_images([tmp_path / "\x1b[31m\n.png"], 8)
    assert str(caught.value).isprintable()


# --- To predict from what was trained on.

KINDS = {
    "square": random_image(0, (40, 40)),
    "upright": random_image(1, (30, 40)),
    "lying": random_image(2, (55, 33)),
    "grey": random_image(3, (50, 33), "L"),
    "bright": Image.eval(random_image(4, (50, 33), "L"), lambda value: 255 - value // 8),
    "two colours": random_image(5, (50, 33), "L").convert("1"),
    "16 bits": Image.fromarray(np.random.default_rng(6).integers(0, 65536, (33, 50), np.uint16)),
    "transparent": random_image(7, (50, 33), "RGBA"),
    "grey and transparent": random_image(8, (50, 33), "RGBA").convert("LA"),
    "palette": random_image(9, (50, 33)).quantize(64),
    "transparent palette": random_image(10, (50, 33)).quantize(16),
    "line": random_image(11, (2000, 3)),
}
SAVED = {"transparent palette": {"transparency": bytes(range(0, 240, 15))}}


def assert_predicted_as_trained(paths: list[Path], largest: int) -> None:
    trained = read_images(paths, largest)
    photos = read_photos(paths, trained.shape[1:], fit="crop", dark_background=True)
    for path, image, photo in zip(paths, trained, photos, strict=True):
        np.testing.assert_array_equal(photo.pixels, image, err_msg=path.name)
        assert not photo.inverted


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_training_file_is_predicted_from_its_training_pixels(ending, tmp_path):
    paths = []
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by 90 degrees
    for kind, image in KINDS.items():
        if ending == "jpg":
            image = image.convert("RGB") if kind != "grey" else image
        for name, more in (("", {}), (" turned", {"exif": exif})):
            paths.append(tmp_path / f"{kind}{name}.{ending}")
            image.save(paths[-1], **SAVED.get(kind, {}) if ending == "png" else {}, **more)
    assert_predicted_as_trained(paths, largest=28)  # in colours
    for path in paths:  # in grey where it is
        assert_predicted_as_trained([path], largest=28)
    assert_predicted_as_trained([paths[0]], largest=64)  # a square, as it is


def test_a_photo_for_a_grey_network_is_cropped_and_grey(tmp_path):
    image = random_image(0, (40, 20))
    image.save(tmp_path / "x.png")
    (photo,) = read_photos([tmp_path / "x.png"], (10, 10, 1), fit="crop", dark_background=True)
    expected = image.resize((20, 10), 2).crop((5, 0, 15, 10)).convert("L")
    np.testing.assert_array_equal(photo.pixels[..., 0], expected)


def test_one_limit_of_size_for_both(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (9000, 9950)).save(path)
    lines = []
    for read_it in (
        lambda: read_images([path], 8),
        lambda: read_photos([path], SHAPE, fit="crop", dark_background=True),
    ):
        with pytest.raises(InputError) as caught:
            read_it()
        lines.append(str(caught.value).removesuffix(": mend or remove what is broken"))
    assert lines == [f"cannot read {path} (9000x9950 pixels, more than 89,478,485)"] * 2


# --- To predict from.


SHAPE = (28, 28, 1)


@pytest.fixture
def pixels():
    return random_images(1, seed=1).images[0, :, :, 0]


def read(path: Path, shape: tuple[int, int, int] = SHAPE) -> Photo:
    return read_photos([path], shape, fit="pad", dark_background=True)[0]


def palette(image: Image.Image) -> Image.Image:
    return image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)


def wide(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


LOSSLESS = {
    "grey": lambda image: image,
    "grey and alpha": lambda image: image.convert("LA"),
    "colours": lambda image: image.convert("RGB"),
    "colours and alpha": lambda image: image.convert("RGBA"),
    "palette": palette,
    "16 bits": wide,
}


@pytest.mark.parametrize("mode", LOSSLESS)
def test_modes_that_keep_every_grey(mode, pixels, tmp_path):
    LOSSLESS[mode](Image.fromarray(pixels)).save(tmp_path / "image.png")
    photo = read(tmp_path / "image.png")
    assert not photo.inverted
    np.testing.assert_array_equal(photo.pixels[..., 0], pixels)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs(mode, pixels, tmp_path):
    large = Image.fromarray(pixels).resize((280, 280), Image.Resampling.BICUBIC)
    large.convert(mode).save(tmp_path / "image.jpg", quality=95)
    found = read(tmp_path / "image.jpg").pixels[..., 0].astype(int)
    expected = np.asarray(large.resize((28, 28), Image.Resampling.BILINEAR))
    assert np.abs(found - expected).max() < 4


def test_black_and_white(pixels, tmp_path):
    Image.fromarray(pixels > 127).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read(tmp_path / "image.png").pixels[..., 0], (pixels > 127) * 255)


def test_a_white_background_is_inverted_to_the_pixel(pixels, tmp_path):
    Image.fromarray(255 - pixels).save(tmp_path / "image.png")
    photo = read(tmp_path / "image.png")
    assert photo.inverted
    np.testing.assert_array_equal(photo.pixels[..., 0], pixels)


def test_photos_are_trimmed_and_what_is_not_quite_white_becomes_black(tmp_path):
    image = np.full((300, 400), 215, np.uint8)
    image[100:220, 140:200] = 20
    Image.fromarray(image).save(tmp_path / "image.png")
    photo = read(tmp_path / "image.png")
    assert photo.inverted
    bright = round((215 - 20) * 255 / 215)
    assert photo.pixels[14, 14] == bright
    # The thing is twice as high as wide: it fills the height, and half of the width.
    assert (photo.pixels[4:-4, 14] == bright).all()
    assert abs((photo.pixels[14, :, 0] > 127).sum() - 14) <= 2
    assert photo.pixels[0, 0] == photo.pixels[-1, -1] == 0


def test_an_empty_page_is_black(tmp_path):
    Image.new("RGB", (300, 200), "white").save(tmp_path / "image.jpg")
    assert read(tmp_path / "image.jpg").inverted
    assert not read(tmp_path / "image.jpg").pixels.any()


def test_where_bright_backgrounds_are_usual_nothing_is_inverted(pixels, tmp_path):
    Image.fromarray(255 - pixels).save(tmp_path / "image.png")
    (photo,) = read_photos([tmp_path / "image.png"], SHAPE, fit="pad", dark_background=False)
    assert not photo.inverted
    np.testing.assert_array_equal(photo.pixels[..., 0], 255 - pixels)


def test_fashion_mnists_own_images_are_told_from_their_negatives(fashion_mnist):
    images = np.concatenate([data.images for data in fashion_mnist])[::7]
    assert not any(map(bright_border, images))
    assert all(map(bright_border, 255 - images))


@pytest.mark.parametrize("grey", [0, 255])
def test_transparency_shows_the_thing(grey, tmp_path):
    """A dark or a bright square on nothing at all, whatever colour nothing has."""
    image = np.full((56, 56, 4), 90, np.uint8)
    image[..., 3] = 0
    image[16:40, 16:40] = (grey, grey, grey, 255)
    Image.fromarray(image).save(tmp_path / "image.png")
    photo = read(tmp_path / "image.png")
    assert photo.inverted == (grey == 0)
    assert photo.pixels[14, 14] == 255
    if not photo.inverted:  # what is inverted is trimmed too
        assert photo.pixels[0, 0] == photo.pixels[-1, -1] == 0


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((1, 1), (0, 28), (0, 28)),
        ((400, 200), (7, 21), (0, 28)),
        ((200, 400), (0, 28), (7, 21)),
        ((60_000, 1), (13, 14), (0, 28)),
        ((3, 60_000), (0, 28), (13, 14)),
    ],
)
def test_proportions_are_kept(size, rows, columns, tmp_path):
    # A border of its own keeps it from being taken for a bright background.
    Image.new("L", size, 100).save(tmp_path / "image.png")
    expected = np.zeros((28, 28), np.uint8)
    expected[slice(*rows), slice(*columns)] = 100
    np.testing.assert_array_equal(read(tmp_path / "image.png").pixels[..., 0], expected)


def test_phones_turn_their_photos(pixels, tmp_path):
    pixels[5:9, 5:9] = 255
    turned = Image.fromarray(np.rot90(pixels))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be seen turned by 90 degrees, clockwise
    turned.save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "image.png").pixels[..., 0], pixels)


def test_networks_for_colours(tmp_path):
    image = np.random.default_rng(0).integers(200, 256, (32, 32, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    photo = read(tmp_path / "image.png", (32, 32, 3))
    assert not photo.inverted
    np.testing.assert_array_equal(photo.pixels, image)


# --- As public reports have it.


def chunk(kind: bytes, content: bytes) -> bytes:
    end = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + end


def png(rows: np.ndarray, depth: int, color: int, *more: bytes) -> bytes:
    """A PNG of samples (H, W) or (H, W, 3), with chunks before the pixels."""
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, color, 0, 0, 0)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows.astype(f">u{depth // 8}"))
    chunks = (chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(pixels)))
    return b"\x89PNG\r\n\x1a\n" + b"".join((*chunks, chunk(b"IEND", b"")))


def read_bytes(content: bytes, path: Path) -> np.ndarray:
    """To train on; what one predicts from is the same."""
    path.write_bytes(content)
    image = read_images([path], 8)[0]
    photo = read_photos([path], image.shape, fit="crop", dark_background=False)[0]
    np.testing.assert_array_equal(photo.pixels, image)
    return image


LARGE = zlib.compress(bytes(2**20 + 1))


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param(chunk(b"zTXt", b"Comment\0\0" + LARGE), id="python-pillow/Pillow#8363"),
        pytest.param(chunk(b"iCCP", b"ICC\0\0" + LARGE), id="KatherLab/STAMP#76"),
        pytest.param(chunk(b"gAMA", bytes(4))[:-1] + b"?", id="a wrong checksum"),
    ],
)
def test_metadata_that_pillow_refuses_are_passed_over(metadata, tmp_path):
    pixels = np.asarray(random_image(0))
    image = read_bytes(png(pixels, 8, 2, metadata), tmp_path / "x.png")
    np.testing.assert_array_equal(image, pixels)


def test_a_level_of_16_bits_may_be_transparent(tmp_path):
    """python-pillow/Pillow#3379: it is composited as in 8 bits."""
    levels = np.full((8, 8), 60_000)
    levels[2:4, 2:4] = 40_000
    levels[6, 6] = 40_001
    content = png(levels, 16, 0, chunk(b"tRNS", struct.pack(">H", 40_000)))
    expected = np.where(levels == 40_000, 0, levels >> 8)
    np.testing.assert_array_equal(read_bytes(content, tmp_path / "x.png")[..., 0], expected)


def test_grey_of_16_bits_is_not_clipped(tmp_path):
    """python-pillow/Pillow#2574, #5991."""
    levels = np.arange(64).reshape(8, 8) * 1000
    image = read_bytes(png(levels, 16, 0), tmp_path / "x.png")
    np.testing.assert_array_equal(image[..., 0], levels >> 8)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "TIFF"])
def test_another_format_under_the_name_of_one_is_named(kind, tmp_path):
    """GabrielePicco/deep-learning-flower-identifier#2: WebP among the .jpg."""
    write_classes(tmp_path, count=2)
    random_image(0).save(tmp_path / "cats" / "x.jpg", kind)
    assert refused(tmp_path) == (
        f"cannot read 1 of 5 images: {tmp_path / 'cats' / 'x.jpg'} (not a PNG or JPEG image): mend "
        "or remove what is broken"
    )


# --- What cannot be read is passed over.


def test_broken_images_are_left_out_and_told(tmp_path, said):
    folder = write_classes(tmp_path / "pets")
    files = find_images(folder)
    whole = read_images(files.paths, 8)
    for number in (0, 3, 4, 7):
        files.paths[number].write_bytes(b"")
    images, read = image_files.read_images(files.paths, 8, skip_broken=True)
    assert read.tolist() == [1, 2, 5, 6, 8, 9]
    np.testing.assert_array_equal(images, whole[read])
    assert len(said) == 1
    assert said[0].startswith(f"passed over 4 of 10 images: {files.paths[0]} (not a PNG or JPEG")
    assert said[0].endswith(" and 1 more")
    assert "cannot read 4 of 10 images: " in refused(folder)
    said.clear()
    images, read = image_files.read_images([files.paths[1]] * 2, 8, skip_broken=True)
    assert (len(images), read.tolist(), said) == (2, [0, 1], [])


def test_what_is_broken_does_not_decide_size_and_colours(tmp_path):
    files = find_images(write_classes(tmp_path, mode="L"))
    random_image(0, (9, 9)).save(files.paths[0])
    content = files.paths[0].read_bytes()
    files.paths[0].write_bytes(content[: len(content) - 40])
    images, read = image_files.read_images(files.paths, 12, skip_broken=True)
    assert len(read) == 9
    assert images.shape == (9, 12, 12, 1)  # its header is read: sizes differ
    files.paths[0].write_bytes(b"")
    assert image_files.read_images(files.paths, 12, skip_broken=True)[0].shape == (9, 8, 8, 1)


def test_if_all_are_broken_nothing_is_passed_over(tmp_path):
    files = find_images(write_classes(tmp_path))
    for path in files.paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"^cannot read 10 of 10 images: .* and 7 more: mend or"):
        image_files.read_images(files.paths, 8, skip_broken=True)


# --- Random crops.


def boxes(size: tuple[int, int], smallest: float = 0.08, count: int = 10_000) -> np.ndarray:
    """Many of them, (count, 4): left, upper, right, lower."""
    draws = np.random.default_rng(0).random((count, 4 * image_files.CROPS_TRIED)).tolist()
    return np.array([image_files.random_box(size, each, smallest) for each in draws])


def not_uniform(values: np.ndarray, low: float, high: float) -> float:
    """Kolmogorov's and Smirnov's statistic, times the root of the count: 1.95 in one of 1,000."""
    expected = (np.sort(values) - low) / (high - low)
    ranks = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(expected - ranks[1:]).max(), np.abs(expected - ranks[:-1]).max())
    return distance * np.sqrt(len(values))


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (1000, 1000), (40, 30), (1, 1), (3, 1)])
@pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
def test_random_boxes_lie_in_the_image(size, smallest):
    left, upper, right, lower = boxes(size, smallest, count=2000).T
    assert (0 <= left).all() and (left < right).all() and (right <= size[0]).all()  # noqa: PT018
    assert (0 <= upper).all() and (upper < lower).all() and (lower <= size[1]).all()  # noqa: PT018
    width, height = right - left, lower - upper
    rounding = (width + height + 0.5) / 2  # half a pixel at each side
    fallback = image_files.random_box(size, [0.999] * 40, 1.0)  # does not fit, if not square
    fell_back = (width == fallback[2] - fallback[0]) & (height == fallback[3] - fallback[1])
    assert (fell_back | (width * height + rounding >= smallest * size[0] * size[1])).all()


def test_random_boxes_have_shares_ratios_and_places_that_are_uniform():
    """Where every box fits: the largest share is so small that no side is too long."""
    draws = np.random.default_rng(0).random((10_000, 40))
    draws[:, ::4] *= (0.7 - 0.08) / (1 - 0.08)
    found = np.array([image_files.random_box((4000, 4000), each, 0.08) for each in draws.tolist()])
    left, upper, right, lower = found.T
    width, height = right - left, lower - upper
    assert not_uniform(width * height / 4000**2, 0.08, 0.7) < 1.95
    assert not_uniform(np.log(width / height), np.log(3 / 4), np.log(4 / 3)) < 1.95
    random = np.random.default_rng(1).random((2, 10_000))  # within the pixel
    assert not_uniform((left + random[0]) / (4000 - width + 1), 0, 1) < 1.95
    assert not_uniform((upper + random[1]) / (4000 - height + 1), 0, 1) < 1.95
    assert left.min() == 0 or (left / (4000 - width)).min() < 0.001
    assert abs(np.corrcoef(width * height, np.log(width / height))[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1000, 100), (433, 0, 566, 100)),  # as wide as 4/3 of its height
        ((100, 1000), (0, 433, 100, 566)),
        ((100, 100), (0, 0, 100, 100)),
        ((101, 100), (0, 0, 101, 100)),
        ((1, 50), (0, 24, 1, 25)),
    ],
)
def test_where_no_box_fits_it_is_the_largest_in_the_middle(size, expected):
    never = [0.99999, 0.99999, 0.5, 0.5] * image_files.CROPS_TRIED
    if size[0] < size[1]:
        never = [0.99999, 0.0, 0.5, 0.5] * image_files.CROPS_TRIED
    assert image_files.random_box(size, never, 0.999) == expected


def test_a_random_crop_is_the_part_resized(tmp_path):
    image = natural_image(0, (90, 70))
    draws = np.random.default_rng(0).random(40).tolist()
    box = image_files.random_box(image.size, draws, 0.08)
    for name, method in (("bilinear", 2), ("bicubic", 3)):
        expected = np.asarray(image.crop(box).resize((24, 24), method))
        found = image_files.resized_crop(image, draws, 0.08, 24, name)
        assert (found.shape, found.dtype) == ((24, 24, 3), np.uint8)
        np.testing.assert_array_equal(found, expected)
    grey = image_files.resized_crop(image.convert("L"), draws, 0.08, 24)
    assert (grey == grey[..., :1]).all()


# --- JPEGs that are decoded smaller.


def crops(path: Path, draws: list[float], size: int = 48, smallest: float = 0.08):
    """A random crop without and with ``draft``, and the size that was decoded."""
    results, decoded = [], []
    for draft in (False, True):
        with Image.open(path) as image:
            crop = image_files.resized_crop(image, draws, smallest, size, draft=draft)
            results.append(crop.astype(int))
            decoded.append(image.size)
    return *results, decoded[1]


def of_share(share: float, place: float = 0.5) -> list[float]:
    """The draws of a square of that share of the area, if the smallest is 0.08."""
    return [(share - 0.08) / 0.92, 0.5, place, place] * image_files.CROPS_TRIED


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path):
    path = tmp_path / "x.jpg"
    natural_image(0, (801, 799)).save(path, quality=90)
    for share, fraction in ((0.95, 8), (0.9, 8), (0.5, 8), (0.25, 8), (0.2, 4), (0.1, 4)):
        whole, draft, decoded = crops(path, of_share(share))
        assert decoded == tuple(-(-side // fraction) for side in (801, 799)), share
        difference = np.abs(whole - draft)
        assert difference.mean() < 0.6
        assert difference.max() < 5


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_what_is_decoded_at_a_fraction_is_not_shifted(place, tmp_path):
    """To a tenth of a pixel: a ramp tells where each pixel is from."""
    ramp = np.tile(np.linspace(0, 255, 797), (797, 1))
    path = tmp_path / "x.jpg"
    Image.fromarray(np.stack([ramp, ramp.T, ramp], -1).astype(np.uint8)).save(path, quality=100)
    whole, draft, decoded = crops(path, of_share(0.5, place))
    assert decoded == (100, 100)
    step = np.diff(whole[24, :, 0]).mean()
    assert np.abs((whole - draft)[2:-2, 2:-2].mean((0, 1))).max() < 0.1 * step


def test_what_is_not_larger_than_needed_is_decoded_in_full(tmp_path):
    natural_image(0, (90, 90)).save(tmp_path / "small.jpg")
    natural_image(0, (400, 400)).save(tmp_path / "large.jpg")
    natural_image(0, (400, 400)).save(tmp_path / "large.png")
    for name, share in (("small.jpg", 0.9), ("large.jpg", 0.05), ("large.png", 0.9)):
        for place in (0.0, 0.3, 0.999):
            whole, draft, decoded = crops(tmp_path / name, of_share(share, place), smallest=0.04)
            np.testing.assert_array_equal(draft, whole)
            assert max(decoded) in (90, 400)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_all_kinds_of_jpeg_are_decoded_smaller(mode, tmp_path):
    natural_image(0, (400, 400)).convert(mode).save(tmp_path / "x.jpg")
    whole, draft, decoded = crops(tmp_path / "x.jpg", of_share(0.9))
    assert decoded == (100, 100)
    assert np.abs(whole - draft).mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_decoded_smaller_are_turned_alike(orientation, tmp_path):
    tag = Image.Exif()
    tag[0x0112] = orientation
    path = tmp_path / "x.jpg"
    natural_image(1, (500, 340)).save(path, quality=92, exif=tag)
    for seed in range(4):
        draws = np.random.default_rng(seed).random(40).tolist()
        whole, draft, decoded = crops(path, draws, size=24)
        assert decoded != (500, 340)
        # Mirrored, it is shifted by less than a pixel, since the last ones are fractions.
        assert np.abs(whole - draft).mean() < 4
        assert np.abs(whole - draft[::-1]).mean() > 10
        assert np.abs(whole - draft.swapaxes(0, 1)).mean() > 10


# --- Torchvision's.


@pytest.mark.foreign
@pytest.mark.parametrize("size", [(500, 375), (100, 333), (64, 64)])
def test_random_boxes_are_distributed_as_torchvisions(size, torchvision):
    import torch

    torch.manual_seed(0)
    image = Image.new("RGB", size)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(10_000)])
    left, upper, right, lower = boxes(size).T
    ours = np.stack([upper, left, lower - upper, right - left], 1)
    for values in (ours, theirs):
        assert (values[:, 2:] > 0).all()
    error = np.sqrt((ours.var(0) + theirs.var(0)) / len(ours))
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    areas = [each[:, 2] * each[:, 3] / (size[0] * size[1]) for each in (ours, theirs)]
    assert abs(areas[0].mean() - areas[1].mean()) < 4 * np.sqrt(2 * areas[0].var() / len(ours))
    np.testing.assert_allclose(
        *(np.quantile(area, np.linspace(0, 1, 11)) for area in areas), atol=0.03
    )


@pytest.mark.foreign
def test_where_no_box_fits_it_is_torchvisions(torchvision):
    from itertools import product

    draw = torchvision.transforms.RandomResizedCrop.get_params
    for width, height in product((1, 2, 3, 50, 99, 100, 101, 133, 134, 500), repeat=2):
        # No box of all of the area is that long.
        upper, left, h, w = draw(Image.new("RGB", (width, height)), (4.0, 4.0), (3 / 4, 4 / 3))
        ours = image_files.random_box((width, height), [0.5] * 40, 4.0)
        assert ours == (left, upper, left + w, upper + h), (width, height)


@pytest.mark.foreign
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_random_crop_is_torchvisions_to_the_pixel(interpolation, torchvision):
    transforms = torchvision.transforms
    method = transforms.InterpolationMode(interpolation)
    for seed in range(20):
        random = np.random.default_rng(seed)
        image = natural_image(seed, tuple(random.integers(20, 200, 2).tolist()))
        draws = random.random(40).tolist()
        left, upper, right, lower = image_files.random_box(image.size, draws, 0.08)
        place = (upper, left, lower - upper, right - left)
        theirs = transforms.functional.resized_crop(image, *place, [64, 64], method)
        ours = image_files.resized_crop(image, draws, 0.08, 64, interpolation)
        np.testing.assert_array_equal(ours, np.asarray(theirs))
