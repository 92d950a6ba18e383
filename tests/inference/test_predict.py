"""Image files of every kind, and what the network makes of them."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_flax.commands import predict
from resnet_flax.commands.command_line import run_command
from resnet_flax.data import image_files as photos
from resnet_flax.data.image_files import bright_border, read_photos
from resnet_flax.errors import InputError
from resnet_flax.inference import predict as inference
from resnet_flax.inference.predict import compute_logits
from resnet_flax.inference.scores import softmax
from tests.support.finished_run import (
    MODEL,
    new_network,
    new_variables,
    random_images,
    write_pretrained,
)

SHAPE = (28, 28, 1)


@pytest.fixture
def pixels():
    return random_images(1, seed=1).images[0, :, :, 0]


@pytest.fixture
def program(monkeypatch, capsys):
    """The program in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(predict, "keep_compiled_programs", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        code = run_command(predict.main)
        return (code, *capsys.readouterr())

    return run


def read(path: Path, shape: tuple[int, int, int] = SHAPE) -> photos.Photo:
    return read_photos([path], shape, dark_background=True)[0]


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
    (photo,) = read_photos([tmp_path / "image.png"], SHAPE, dark_background=False)
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


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def truncated(folder: Path) -> bytes:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(
        folder / "whole.png"
    )
    return (folder / "whole.png").read_bytes()[:1000]


BAD = {
    "empty": (lambda folder: b"", "not a PNG or JPEG image"),
    "text": (lambda folder: b"hello", "not a PNG or JPEG image"),
    "another format": (lambda folder: b"GIF89a" + bytes(100), "not a PNG or JPEG image"),
    "truncated": (truncated, "truncated"),
    "bomb": (lambda folder: png(7500, 7500, bytes(10)), "7500x7500 pixels, more than 50,000,000"),
    "large bomb": (lambda folder: png(12000, 12000, b""), "12000x12000 pixels, more than"),
    "huge bomb": (lambda folder: png(2**31 - 1, 2**31 - 1, b""), "more than 50,000,000 pixels"),
    "no pixels": (lambda folder: png(28, 28, b""), ""),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_end_in_one_line(kind, shared_run, tmp_path, program):
    content, words = BAD[kind]
    (tmp_path / "bad.png").write_bytes(content(tmp_path))
    code, said, error = program(shared_run.folder, tmp_path / "bad.png")
    assert (code, said) == (2, "")
    assert error.startswith(f"predict.py: error: cannot read {tmp_path / 'bad.png'} (")
    assert words in error
    assert error.count("\n") == 1


def test_missing_files_folders_and_odd_names(shared_run, tmp_path, program):
    for name, reason in {"absent.png": "no such file", "": "not a file"}.items():
        code, said, error = program(shared_run.folder, tmp_path / name)
        assert (code, said) == (2, "")
        assert reason in error
    (tmp_path / "red\x1b[31m\n.png").write_text("")
    code, _, error = program(shared_run.folder, tmp_path / "red\x1b[31m\n.png")
    assert code == 2
    assert error.strip().isprintable()


def test_one_bad_image_among_good_ones_prints_nothing_of_the_others(
    shared_run, pixels, tmp_path, program
):
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for path in paths:
        Image.fromarray(pixels).save(path)
    paths[7].write_text("bad")
    code, said, error = program(shared_run.folder, *paths)
    assert (code, said) == (2, "")
    assert error.startswith(f"predict.py: error: cannot read 1 of 10 images: {paths[7]} (not a")
    for path in paths:
        path.write_text("bad")
    assert "10 of 10 images" in (error := program(shared_run.folder, *paths)[2])
    assert error.endswith("and 5 more\n")
    assert error.count("\n") == 1


def test_a_folder_that_holds_no_network(tmp_path, program):
    code, said, error = program(tmp_path, tmp_path / "image.png")
    assert (code, said) == (2, "")
    assert "holds no trained network" in error


def test_the_table(shared_run, tmp_path, program):
    folder, network, variables, data = shared_run
    Image.fromarray(data.images[0, :, :, 0]).save(tmp_path / "dark.png")
    Image.fromarray(255 - data.images[1, :, :, 0]).save(tmp_path / "light.png")
    code, said, _ = program(folder, tmp_path / "dark.png", tmp_path / "light.png")
    assert code == 0
    first, second = said.splitlines()
    assert first.startswith(f"{tmp_path}/dark.png ")
    assert second.startswith(f"{tmp_path}/light.png (inverted: light background)  ")
    probabilities = softmax(compute_logits(network, variables, data.images[:2]))
    for line, shares in zip((first, second), probabilities, strict=True):
        answers = [f"{network.classes[i]} {shares[i]:.1%}" for i in np.argsort(-shares)[:3]]
        positions = [line.index(answer) for answer in answers]
        assert positions == sorted(positions)


def test_json(shared_run, tmp_path, program):
    folder, network, variables, data = shared_run
    Image.fromarray(data.images[0, :, :, 0]).save(tmp_path / "image.png")
    code, said, _ = program(folder, tmp_path / "image.png", "--json")
    assert code == 0
    (answer,) = json.loads(said)
    assert answer["image"] == str(tmp_path / "image.png")
    assert answer["inverted"] is False
    shares = softmax(compute_logits(network, variables, data.images[:1]))[0]
    assert [each["class"] for each in answer["top"]] == [
        network.classes[i] for i in np.argsort(-shares)[:3]
    ]
    assert [each["probability"] for each in answer["top"]] == sorted(shares)[:-4:-1]


def test_many_images_are_one_compiled_shape_in_full_batches(shared_run, tmp_path, monkeypatch):
    folder, network, variables, _ = shared_run
    paths = [tmp_path / f"{number}.png" for number in range(600)]
    images = random_images(600, seed=2).images
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path, compress_level=0)
    shapes = []
    infer = inference._infer

    def note(model, variables, images, **keywords):
        shapes.append(images.shape)
        return infer(model, variables, images, **keywords)

    monkeypatch.setattr(inference, "_infer", note)
    predictions = predict.predict(folder, paths)
    assert shapes == [(256, 28, 28, 1)] * 3
    assert [each.image for each in predictions] == list(map(str, paths))
    alone = softmax(compute_logits(network, variables, images[555:556]))[0]
    name, share = predictions[555].top[0]
    assert name == network.classes[alone.argmax()]
    np.testing.assert_allclose(share, alone.max(), rtol=1e-4)


def test_the_answers_are_those_of_training(shared_run):
    """Mirrored, where the recipe does so; and prepared as there."""
    data = random_images(7)
    network = new_network(image_size=32, flip=True)
    variables = new_variables(network)
    plain = compute_logits(new_network(image_size=32), variables, data.images)
    mirrored = compute_logits(new_network(image_size=32), variables, data.images[:, :, ::-1])
    averaged = compute_logits(network, variables, data.images)
    np.testing.assert_allclose(averaged, (plain + mirrored) / 2, rtol=1e-4, atol=1e-5)
    resized = [Image.fromarray(image[..., 0]).resize((32, 32), 2) for image in data.images]
    inputs = np.stack(resized)[..., None] / np.float32(255)
    np.testing.assert_allclose(jax.jit(MODEL.apply)(variables, inputs), plain, rtol=1e-3, atol=1e-4)


def test_no_images_and_damaged_weights(shared_run):
    folder, network, variables, data = shared_run
    assert predict.predict(folder, []) == []
    damaged = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    with pytest.raises(InputError, match="outputs are not finite"):
        compute_logits(network, damaged, data.images)


def test_channels_that_no_file_has(tmp_path):
    write_pretrained(tmp_path, new_network(image_shape=(28, 28, 2)))
    with pytest.raises(InputError, match="takes images of 2 channels"):
        predict.predict(tmp_path, [])


def test_as_a_program(shared_run, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "image.png")
    command = [
        sys.executable,
        "-m",
        "resnet_flax.commands.predict",
        shared_run.folder,
        tmp_path / "image.png",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'image.png'}  ")
    assert done.stdout.count("%") == 3
