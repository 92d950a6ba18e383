"""``resnet-flax export``: the files it writes, and what it says of them."""

import shutil
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

from resnet_flax import ARCHITECTURES, build_model
from resnet_flax.commands import export
from resnet_flax.commands.command_line import run_command
from resnet_flax.nn.preprocessing import mirrored_logits
from tests.support.finished_run import new_network, write_pretrained
from tests.support.hub_server import WRITER


def random_input():
    return np.random.default_rng(2).random((2, 28, 28, 1), np.float32)


def logits(network, variables, images):
    """Of the finished run's network, which averages them with the mirror image's."""
    return np.asarray(
        jax.jit(
            partial(mirrored_logits, partial(network.model.apply, variables), flip=network.flip)
        )(images)
    )


@pytest.fixture
def program(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        code = run_command(export.main)
        return (code, *capsys.readouterr())

    return run


ALONE = """
import sys
import jax
import numpy as np
run = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
images = np.random.default_rng(2).random((2, 28, 28, 1), np.float32)
np.save(sys.argv[2], run(images))
assert not any(name.startswith(("flax", "resnet_flax")) for name in sys.modules)
"""


def test_the_stablehlo_file_needs_jax_alone(shared_run, program, tmp_path):
    _, network, variables, _ = shared_run
    folder = shutil.copytree(shared_run.folder, tmp_path / "run")
    code, said, error = program(folder, "--to", "stablehlo")
    assert (code, error) == (0, "")
    path = folder / "model.stablehlo"
    assert said == (
        f"{path}: from images (N, 28, 28, 1) to 10 logits, averaged with the mirror image's, "
        "checked\n"
    )
    command = [sys.executable, "-c", "import jax.export" + ALONE, path, tmp_path / "logits.npy"]
    subprocess.run([*map(str, command)], check=True)
    expected = logits(network, variables, random_input())
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=1e-3, atol=1e-4)


def test_the_onnx_file(shared_run, program, tmp_path):
    folder, network, variables, _ = shared_run
    output = tmp_path / "network.onnx"
    code, said, _ = program(folder, "--to", "onnx", "--output", output)
    assert code == 0
    assert said.startswith(f"{output}: from images")
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    images = random_input()
    (found,) = onnxruntime.InferenceSession(output).run(None, {"images": images})
    np.testing.assert_allclose(found, logits(network, variables, images), rtol=1e-3, atol=1e-4)


def test_a_link_in_the_folder_is_replaced_not_followed(shared_run, program, tmp_path):
    folder = shutil.copytree(shared_run.folder, tmp_path / "run")
    (tmp_path / "precious").write_text("precious")
    (folder / "model.onnx").symlink_to(tmp_path / "precious")
    assert program(folder, "--to", "onnx")[0] == 0
    assert (tmp_path / "precious").read_text() == "precious"
    onnx.load(folder / "model.onnx")


def test_bad_input_is_one_line(shared_run, program, tmp_path):
    folder, *_ = shared_run
    code, said, error = program(tmp_path, "--to", "onnx")
    assert (code, said) == (2, "")
    assert "holds no trained network" in error
    code, said, error = program(folder, "--to", "onnx", "--output", tmp_path / "no" / "file")
    assert (code, said) == (2, "")
    assert f"cannot write {tmp_path / 'no' / 'file'}: No such file or directory" in error


def test_a_folder_for_timm_and_transformers(program, tmp_path, hub, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", {"stage_sizes": (1, 1), "channels": 4})
    write_pretrained(tmp_path, new_network(build_model("tiny", "torchvision"), fit="crop"))
    code, said, error = program(tmp_path, "--to", "huggingface")
    folder = tmp_path / "huggingface"
    assert code == 0
    assert said == f"{folder}: 10 classes, for timm, transformers and resnet_flax\n"
    assert error.startswith("timm's form cannot say: here pictures that are no square")
    assert "architecture" in (folder / "config.json").read_text()
    code, said, error = program(tmp_path, "--to", "huggingface", "--push", "me/mine")
    assert (code, said.count("\n")) == (2, 1)  # the folder stays
    assert "export.py: error: cannot upload to 'me/mine'" in error
    monkeypatch.setenv("HF_TOKEN", WRITER)
    code, said, _ = program(tmp_path, "--to", "huggingface", "--push", "me/mine", "--private")
    assert (code, said.splitlines()[1]) == (0, f"{hub.endpoint}/me/mine")


def test_what_timm_has_not_is_one_line(shared_run, program):
    code, said, error = program(shared_run.folder, "--to", "huggingface")
    assert (code, said, error.count("\n")) == (2, "", 1)
    assert "timm and transformers have no such network: stage_sizes [1, 1], use_bias True" in error
    assert "in torchvision's flavour" in error
    assert not (shared_run.folder / "huggingface").exists()


@pytest.mark.parametrize(
    "flags", [("--to", "onnx", "--push", "a/b"), ("--to", "onnx", "--private")]
)
def test_flags_that_do_not_go_together(program, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        program("network", *flags)
    assert f"{flags[2]} needs --" in capsys.readouterr().err
