"""``resnet-flax predict``: good image files and bad ones, a table and JSON."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_flax.commands import predict
from resnet_flax.commands.command_line import run_command
from resnet_flax.inference.predict import compute_logits
from resnet_flax.inference.scores import softmax
from tests.support.finished_run import random_images


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


@pytest.mark.parametrize("program", ["resnet_flax predict", "resnet_flax.predict"])
def test_as_a_program(program, shared_run, pixels, tmp_path):
    """Also as the cards of version 0.1.0 say it."""
    Image.fromarray(pixels).save(tmp_path / "image.png")
    command = [sys.executable, "-m", *program.split(), shared_run.folder, tmp_path / "image.png"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'image.png'}  ")
    assert done.stdout.count("%") == 3


def test_what_the_program_is_called_in_messages(tmp_path):
    (tmp_path / "absent").mkdir()
    for program, name in {
        "resnet_flax predict": "python -m resnet_flax predict",
        "resnet_flax.predict": "predict.py",
    }.items():
        command = [sys.executable, "-m", *program.split(), str(tmp_path / "absent"), "image.png"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{name}: error: {tmp_path / 'absent'} holds no trained")
        assert done.stderr.count("\n") == 1
