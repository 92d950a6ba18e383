"""Exported programs are run beside the network, each in its own engine."""

import builtins
import dataclasses
import subprocess
import sys

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

from resnet_flax import Bottleneck, ResNet
from resnet_flax.errors import InputError
from resnet_flax.inference.export import check, export, export_onnx, export_stablehlo
from resnet_flax.inference.predict import compute_logits
from tests.support.finished_run import MODEL, new_network, new_variables, random_images

SMALL = {"stage_sizes": (1, 2), "channels": 8}
MODELS = {
    "d2l": ResNet(**SMALL),
    "torchvision": ResNet(**SMALL, use_bias=False, norm_shortcut=True),
    "bottleneck": ResNet(**SMALL, block=Bottleneck, norm_shortcut=True),
    "stride first": ResNet(**SMALL, block=Bottleneck, stride_first=True, width_multiplier=2),
    "preactivation": ResNet(**SMALL, preactivation=True, stem="cifar"),
    "preactivated bottleneck": ResNet(**SMALL, block=Bottleneck, preactivation=True),
    "groups": ResNet(**SMALL, block=Bottleneck, groups=2, width_per_group=128),
    "dilation": ResNet(
        (1, 2, 2),
        channels=8,
        stem="cifar",
        block=Bottleneck,
        replace_stride_with_dilation=(False, True),
    ),
    "D": ResNet((1, 1, 1), channels=8, stem="deep", average_shortcut=True, norm_shortcut=True),
    "small stem": ResNet(**SMALL, stem="small", epsilon=1e-2),
}
# Three of its convolutions would take Winograd's way on a CPU.
WIDE = ResNet((1, 1), channels=64, stem="small")


def logits(network, variables, images):
    return np.asarray(jax.jit(network.model.apply)(variables, images))


def random_input(count, size=20, channels=1):
    return np.random.default_rng(count).random((count, size, size, channels), np.float32)


def run(kind, content, images):
    """The logits of an exported program in its own engine."""
    if kind == "onnx":
        return onnxruntime.InferenceSession(content).run(["logits"], {"images": images})[0]
    return np.asarray(jax.export.deserialize(bytearray(content)).call(images))


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


@pytest.mark.parametrize("name", ["groups", "D"])
def test_stablehlo_of_the_familys_other_fields(name):
    network = new_network(MODELS[name], image_size=20)
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


@pytest.mark.parametrize(
    ("kind", "write"), [("onnx", export_onnx), ("stablehlo", export_stablehlo)]
)
def test_the_logits_are_those_that_the_accuracy_was_measured_with(kind, write):
    """Averaged with the mirror image's, for a network that is scored so."""
    mirroring = new_network(flip=True)
    variables = new_variables(mirroring)
    pixels = random_images(5).images
    images = pixels / np.float32(255)
    content = write(mirroring, variables)
    expected = compute_logits(mirroring, variables, pixels)
    plain = compute_logits(new_network(), variables, pixels)
    assert np.abs(expected - plain).max() > 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(run(kind, content, images), expected, rtol=1e-3, atol=1e-4)
    plainly = write(dataclasses.replace(mirroring, flip=False), variables)
    np.testing.assert_allclose(run(kind, plainly, images), plain, rtol=1e-3, atol=1e-4)


def test_both_passes_of_a_mirroring_graph_share_the_weights():
    network, mirroring = new_network(), new_network(flip=True)
    variables = new_variables(network)
    once, twice = (
        onnx.load_from_string(export_onnx(n, variables)).graph for n in (network, mirroring)
    )
    names = [{each.name for each in graph.initializer} for graph in (once, twice)]
    assert names[1] - names[0] == {"start", "end", "axis", "step"}
    added = [node.op_type for node in twice.node]
    assert (added.count("Slice"), added.count("Mean")) == (1, 1)
    assert len(twice.node) == 2 * (len(once.node) - 1) + 3


def test_a_program_that_leaves_the_mirror_image_out_is_not_let_through():
    network = new_network(flip=True)
    variables = new_variables(network)
    forward = jax.jit(network.model.apply)
    with pytest.raises(RuntimeError, match="the exported program's logits differ"):
        check(network, variables, lambda images: forward(variables, images))


def test_a_runs_folder_is_exported_in_one_call(shared_run, tmp_path):
    folder, network, variables, data = shared_run
    path, found = export(folder, "onnx", tmp_path / "network.onnx")
    assert path == tmp_path / "network.onnx"
    assert found.as_json() == network.as_json()
    expected = compute_logits(network, variables, data.images[:3])
    images = data.images[:3] / np.float32(255)
    found = run("onnx", path.read_bytes(), images)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="unknown format 'tflite': choose from stablehlo, onnx"):
        export(folder, "tflite")


def test_onnx_is_imported_for_an_export_alone():
    program = (
        "import sys, resnet_flax.inference; assert not {'onnx', 'onnxruntime'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_is_not_installed_is_named(shared_run, monkeypatch):
    imports = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "onnxruntime":
            raise ImportError(name, name=name)
        return imports(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs onnxruntime: .*'resnet_flax\[onnx\]'"):
        export_onnx(*shared_run[1:3])
