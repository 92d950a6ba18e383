"""Exported programs are run beside the network, each in its own engine."""

import builtins
import shutil
import subprocess
import sys

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

from resnet_flax import Bottleneck, ResNet
from resnet_flax.commands import export
from resnet_flax.commands.command_line import run_command
from resnet_flax.commands.export import check, export_onnx, export_stablehlo
from resnet_flax.errors import InputError
from tests.support.finished_run import MODEL, new_network, new_variables

SMALL = {"stage_sizes": (1, 2), "channels": 8}
MODELS = {
    "d2l": ResNet(**SMALL),
    "torchvision": ResNet(**SMALL, use_bias=False, norm_shortcut=True),
    "bottleneck": ResNet(**SMALL, block=Bottleneck, norm_shortcut=True),
    "stride first": ResNet(**SMALL, block=Bottleneck, stride_first=True, width_multiplier=2),
    "preactivation": ResNet(**SMALL, preactivation=True, stem="cifar"),
    "preactivated bottleneck": ResNet(**SMALL, block=Bottleneck, preactivation=True),
    "small stem": ResNet(**SMALL, stem="small", epsilon=1e-2),
}
# Three of its convolutions would take Winograd's way on a CPU.
WIDE = ResNet((1, 1), channels=64, stem="small")


def logits(network, variables, images):
    return np.asarray(jax.jit(network.model.apply)(variables, images))


def random_input(count, size=20, channels=1):
    return np.random.default_rng(count).random((count, size, size, channels), np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_gives_the_networks_logits(name):
    network = new_network(MODELS[name], image_size=20, image_shape=(20, 20, 3))
    content = export_onnx(network, new_variables(network))  # it has compared them
    session = onnxruntime.InferenceSession(content)
    assert session.get_inputs()[0].shape == ["N", 20, 20, 3]
    assert session.get_outputs()[0].shape == ["N", 10]


def test_the_onnx_graph_has_the_plain_operators():
    network = new_network(MODELS["torchvision"])
    graph = onnx.load_from_string(export_onnx(network, new_variables(network))).graph
    found = [node.op_type for node in graph.node]
    assert found.count("Conv") == 1 + 3 * 2 + 1
    assert found.count("BatchNormalization") == 1 + 3 * 2 + 1
    assert found.count("Add") == 3
    assert set(found) - {"Conv", "BatchNormalization", "Add"} == {
        "Transpose",
        "Relu",
        "MaxPool",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
    }


def test_stablehlo_gives_the_networks_logits():
    network = new_network(MODELS["d2l"], image_size=20, image_shape=(20, 20, 3))
    program = jax.export.deserialize(bytearray(export_stablehlo(network, new_variables(network))))
    assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
    assert str(program.in_avals[0].shape) == "(N, 20, 20, 3)"


def test_stablehlo_of_convolutions_that_take_another_way_on_a_cpu():
    network = new_network(WIDE)
    assert export_stablehlo(network, new_variables(network))


def test_bfloat16_networks():
    network = new_network(MODEL.clone(dtype="bfloat16"))
    variables = new_variables(network)
    images = random_input(4, size=28)
    expected = logits(new_network(), variables, images)
    session = onnxruntime.InferenceSession(export_onnx(network, variables))
    found = session.run(None, {"images": images})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)  # in float32
    export_stablehlo(network, variables)


def test_a_program_that_differs_is_not_let_through():
    network = new_network()
    variables = new_variables(network)
    forward = jax.jit(network.model.apply)
    check(network, variables, lambda images: forward(variables, images))
    for change in (1.01, np.nan, -1):
        with pytest.raises(RuntimeError, match="the exported program's logits differ"):
            check(network, variables, lambda images, by=change: by * forward(variables, images))


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
    assert said == f"{path}: from images (N, 28, 28, 1) to 10 logits, checked\n"
    command = [sys.executable, "-c", "import jax.export" + ALONE, path, tmp_path / "logits.npy"]
    subprocess.run([*map(str, command)], check=True)
    expected = logits(network, variables, random_input(2, size=28))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=1e-3, atol=1e-4)


def test_the_onnx_file(shared_run, program, tmp_path):
    folder, network, variables, _ = shared_run
    output = tmp_path / "network.onnx"
    code, said, _ = program(folder, "--to", "onnx", "--output", output)
    assert code == 0
    assert said.startswith(f"{output}: from images")
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    images = random_input(2, size=28)
    (found,) = onnxruntime.InferenceSession(output).run(None, {"images": images})
    np.testing.assert_allclose(found, logits(network, variables, images), rtol=1e-3, atol=1e-4)


def test_a_link_in_the_folder_is_replaced_not_followed(shared_run, program, tmp_path):
    folder = shutil.copytree(shared_run.folder, tmp_path / "run")
    (tmp_path / "precious").write_text("precious")
    (folder / "model.onnx").symlink_to(tmp_path / "precious")
    assert program(folder, "--to", "onnx")[0] == 0
    assert (tmp_path / "precious").read_text() == "precious"
    onnx.load(folder / "model.onnx")


def test_bad_input_is_one_line(shared_run, program, tmp_path, monkeypatch):
    folder, *_ = shared_run
    code, said, error = program(tmp_path, "--to", "onnx")
    assert (code, said) == (2, "")
    assert "holds no trained network" in error
    code, said, error = program(folder, "--to", "onnx", "--output", tmp_path / "no" / "file")
    assert (code, said) == (2, "")
    assert f"cannot write {tmp_path / 'no' / 'file'}: No such file or directory" in error
    imports = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "onnxruntime":
            raise ImportError(name, name=name)
        return imports(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs onnxruntime: .*'resnet_flax\[onnx\]'"):
        export_onnx(*shared_run[1:3])
