"""Which network a ``config.json`` of others describes, and what it was trained to see."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import Resizing
from resnet_flax.errors import InputError
from resnet_flax.inference import Network, read_images, read_network
from resnet_flax.nn import Normalization, build_model
from resnet_flax.nn.blocks import Residual
from resnet_flax.nn.preprocessing import IMAGENET_NORMALIZATION
from resnet_flax.nn.resnet import ResNet, describe_model

TIMM = {
    "architecture": "resnet18",
    "num_classes": 1000,
    "num_features": 512,
    "global_pool": "avg",
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "test_crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
        "first_conv": "conv1",
        "classifier": "fc",
    },
}
TRANSFORMERS = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "depths": [1, 2],
    "hidden_sizes": [8, 16],
    "embedding_size": 8,
    "layer_type": "basic",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "num_channels": 3,
    "id2label": {"0": "cat", "1": "dog"},
}
CONVNEXT = {
    "image_processor_type": "ConvNextImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
    "crop_pct": 0.875,
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.1, 0.2, 0.3],
}


def network(folder: Path, config: Any, preprocessor: Any = None) -> Network:
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return read_network(folder)


def same(model: ResNet, other: ResNet) -> bool:
    """Whether they are one function of one set of weights."""
    return (describe_model(model), model.num_classes) == (describe_model(other), other.num_classes)


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with other values; those of ``pretrained_cfg`` are changed in it."""
    new = copy.deepcopy(config)
    for name, value in changes.items():
        inner = new.get("pretrained_cfg", {})
        (inner if name in inner and name != "num_classes" else new)[name] = value
    return new


def test_timms(tmp_path):
    read = network(tmp_path, TIMM)
    assert same(read.model, build_model("resnet18", "torchvision", num_classes=1000))
    assert read.resizing == Resizing(235, interpolation="bicubic")  # floor(224 / 0.95)
    assert read.normalization == IMAGENET_NORMALIZATION
    assert (read.image_size, read.image_shape, read.flip) == (224, (224, 224, 3), False)
    assert read.dataset == "imagenet2012"
    assert (read.classes[0], read.classes[207], read.classes[999]) == (
        "tench",
        "golden retriever",
        "toilet tissue",
    )
    again = Network.from_json(json.loads(json.dumps(read.as_json())))
    assert again.as_json() == read.as_json()


def test_timms_of_other_classes_sizes_and_channels(tmp_path):
    own = changed(TIMM, num_classes=2, crop_mode="squash", crop_pct=1.0, interpolation="bilinear")
    read = network(tmp_path, {**own, "label_names": ["n1", "n2"]})
    assert read.classes == ("n1", "n2")
    assert read.resizing == Resizing(224, squash=True)
    assert read.dataset == "unknown"
    told = {**own, "label_names": ["n1", "n2"], "label_descriptions": {"n2": "cat, domestic"}}
    assert network(tmp_path, told).classes == ("n1", "cat, domestic")
    assert network(tmp_path, {**own, "label_names": {"1": "cat"}}).classes == ("class 0", "cat")
    assert network(tmp_path, own).classes == ("class 0", "class 1")
    grey = {**own, "model_args": {"in_chans": 1, "global_pool": "avg", "drop_rate": 0.1}}
    read = network(tmp_path, grey)
    assert read.image_shape == (224, 224, 1)
    assert read.normalization == Normalization((0.485,), (0.229,))
    old = {"architecture": "resnet50", **TIMM["pretrained_cfg"]}  # timm once wrote no inner table
    assert network(tmp_path, old).resizing == Resizing(235, interpolation="bicubic")


def test_transformers(tmp_path):
    read = network(tmp_path, TRANSFORMERS, CONVNEXT)
    fields = {"use_bias": False, "norm_shortcut": True, "num_classes": 2}
    assert same(read.model, ResNet((1, 2), Residual, channels=8, **fields))
    assert read.classes == ("cat", "dog")
    assert read.resizing == Resizing(256, interpolation="bicubic", rounds_down=True)
    assert read.normalization == Normalization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    wide = changed(TRANSFORMERS, layer_type="bottleneck", hidden_sizes=[32, 64])
    assert network(tmp_path, wide).model.block.__name__ == "Bottleneck"
    first = changed(wide, downsample_in_bottleneck=True)
    assert network(tmp_path, first).model.stride_first


@pytest.mark.parametrize(
    ("processor", "size", "resizing"),
    [
        ({}, 224, Resizing(256, interpolation="bicubic", rounds_down=True)),
        (CONVNEXT, 224, Resizing(256, interpolation="bicubic", rounds_down=True)),
        (
            {**CONVNEXT, "size": 384, "resample": 2},
            384,
            Resizing(384, squash=True, rounds_down=True),
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 160, "width": 160}},
            160,
            Resizing(160, squash=True, rounds_down=True),
        ),
        (
            {
                "feature_extractor_type": "BitImageProcessor",
                "size": {"shortest_edge": 200},
                "crop_size": {"height": 192, "width": 192},
                "resample": 1,
            },
            192,
            Resizing(200, interpolation="lanczos", rounds_down=True),
        ),
    ],
)
def test_transformers_processors(tmp_path, processor, size, resizing):
    read = network(tmp_path, TRANSFORMERS, processor)
    assert (read.image_size, read.resizing) == (size, resizing)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("torchvision/resnet50", 232),
        ("torchvision/resnet50.IMAGENET1K_V1", 256),
        ("torchvision/resnet18", 256),
        ("torchvision/wide_resnet101_2", 232),
    ],
)
def test_torchvisions(name, side):
    read = read_network(name)
    architecture = name.partition("/")[2].partition(".")[0]
    assert same(read.model, build_model(architecture, "torchvision", num_classes=1000))
    assert read.resizing == Resizing(side)
    assert read.normalization == IMAGENET_NORMALIZATION


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(TIMM, architecture="resnetblur18"), "timm's 'resnetblur18' is not supported: of "),
        (changed(TIMM, architecture="seresnet18"), "timm's 'seresnet18' is not supported"),
        (changed(TIMM, architecture="resnet50_gn"), "timm's 'resnet50_gn' is not supported"),
        (changed(TIMM, architecture="vit_base_patch16_224"), "'vit_base_patch16_224' is not"),
        (changed(TIMM, model_args={"output_stride": 8}), r"resnet18 with {'output_stride': 8} is"),
        (changed(TIMM, global_pool="catavgmax"), r"with {'global_pool': 'catavgmax'} is not"),
        (changed(TIMM, crop_mode="border"), "crop_mode 'border' are not supported"),
        (changed(TIMM, input_size=[3, 224, 160]), "images of 224x160"),
        (changed(TIMM, interpolation="random"), "resizing cannot be"),
        (changed(TIMM, crop_pct=0), "is not"),
        (changed(TIMM, num_classes=10**12), "num_classes cannot be 1000000000000"),
        (changed(TIMM, std=[0.2, 0.2, 0.0]), "normalization cannot be"),
        ({"model_type": "vit"}, "transformers' 'vit' is not supported: its 'resnet' is"),
        (changed(TRANSFORMERS, hidden_sizes=[8, 24]), r"hidden_sizes \[8, 24\], embedding_size 8"),
        (changed(TRANSFORMERS, hidden_act="gelu"), "hidden_act 'gelu'"),
        (changed(TRANSFORMERS, downsample_in_first_stage=True), "downsample_in_first_stage True"),
        ({"model_type": "resnet"}, "a value is missing or of the wrong kind"),
        ({"pretrained_cfg": {}}, 'it has no table "network"'),
        ([], 'it has no table "network"'),
    ],
)
def test_what_is_another_function_is_refused_by_name(tmp_path, config, words):
    if config == changed(TIMM, crop_pct=0):  # timm takes it for none given
        assert network(tmp_path, config).resizing == Resizing(256, interpolation="bicubic")
        return
    with pytest.raises(InputError, match=words) as caught:
        network(tmp_path, config)
    assert "config.json describes no network: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({**CONVNEXT, "do_normalize": False}, r"without \['do_normalize'\]"),
        ({"image_processor_type": "SamImageProcessor", "size": {"longest_edge": 1024}}, "'Sam"),
        ({**CONVNEXT, "rescale_factor": 1.0}, "is not supported"),
        ({**CONVNEXT, "resample": 17}, "a value is missing"),
        ({**CONVNEXT, "size": "large"}, "a value is missing"),
        (3, "a value is missing"),
    ],
)
def test_processors_that_do_something_else_are_refused(tmp_path, processor, words):
    with pytest.raises(InputError, match=words):
        network(tmp_path, TRANSFORMERS, processor)


def test_whatever_a_file_says_the_answer_is_a_network_or_one_line(tmp_path):
    values = [None, True, -1, 0, 3, 1e300, float("nan"), "", "x", [], {}, [1, "a"], {"0": 1}]
    refused = 0
    for seed in range(300):
        chosen = random.Random(seed)
        config = copy.deepcopy(chosen.choice([TIMM, TRANSFORMERS]))
        processor = copy.deepcopy(CONVNEXT)
        tables = [config, config.get("pretrained_cfg", processor)]
        for _ in range(chosen.randint(1, 3)):
            table = chosen.choice(tables)
            table[chosen.choice([*table])] = chosen.choice(values)
        said = None
        try:
            network(tmp_path, config, processor)
        except InputError as error:
            said = str(error)
        refused += said is not None
        assert said is None or len(said.splitlines()) == 1, config
    assert 50 < refused < 300


def test_an_odd_margin_is_cut_as_each_of_them_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = network(tmp_path, TRANSFORMERS, {**CONVNEXT, "size": 14, "crop_pct": 1.0})
    for resizing, left, top in (
        # 24 x 16 becomes 25 x 17, of which 11 columns and 3 rows are cut: 5.5 and 1.5 on a side.
        (Resizing(17, interpolation="bicubic", rounds_down=True), 5, 1),
        (Resizing(17, interpolation="bicubic"), 6, 2),
        # The other way round: half of 5 goes to the even number.
        (Resizing(19, interpolation="bilinear"), 7, 2),
    ):
        small = read.__class__(**{**vars(read), "resizing": resizing})
        (found,) = read_images(small, [tmp_path / "x.png"])
        method = Image.Resampling[resizing.interpolation.upper()]
        side = resizing.side
        whole = Image.fromarray(pixels).resize((side * 24 // 16, side), method)
        expected = np.asarray(whole, np.float32)[top : top + 14, left : left + 14] / np.float32(255)
        mean, std = (np.float32(values) for values in read.normalization)
        np.testing.assert_array_equal(found, (expected - mean) / std)


def test_a_line_of_pixels_is_refused_instead_of_filling_the_memory(tmp_path):
    Image.new("RGB", (40_000, 3)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"x.png \(40000x3 pixels: too long and thin\)"):
        read_images(network(tmp_path, TRANSFORMERS, CONVNEXT), [tmp_path / "x.png"])
