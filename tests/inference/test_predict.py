"""What a network makes of image files, good ones and bad."""

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
from resnet_flax.data.image_files import read_images
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
from tests.support.image_files import random_image


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
    "bomb": (lambda folder: png(9500, 9500, bytes(10)), "9500x9500 pixels, more than 89,478,485"),
    "large bomb": (lambda folder: png(12000, 12000, b""), "12000x12000 pixels, more than"),
    "huge bomb": (lambda folder: png(2**31 - 1, 2**31 - 1, b""), "more than 89,478,485 pixels"),
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
    assert error.endswith("and 7 more\n")
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


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_photo_is_fitted_as_the_training_images_were(fit, tmp_path):
    (tmp_path / "run").mkdir()
    network = new_network(image_shape=(28, 28, 3), fit=fit)
    variables = write_pretrained(tmp_path / "run", network)
    path = tmp_path / "lying.png"
    random_image(0, (60, 30)).save(path)
    trained = read_images([path], 28)
    shares = softmax(compute_logits(network, variables, trained))[0]
    (found,) = predict.predict(tmp_path / "run", [path])
    expected = [(network.classes[i], shares[i]) for i in np.argsort(-shares)[:3]]
    assert (found.top == expected) == (fit == "crop")


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
