"""PyTorch's names: those of each layout, and prefixes of wrapped networks."""

import numpy as np
import pytest

from resnet_flax import build_model, resnet18
from resnet_flax.errors import InputError
from resnet_flax.weights import LAYOUTS, from_torch, to_torch
from resnet_flax.weights.keys import listed
from tests.support.state_dicts import SMALL, SMALL_STATE_DICT, assert_same, random_variables
from tests.support.torch_reference import d2l_resnet18


def test_the_prefixes_of_all_keys_are_those_of_the_originals() -> None:
    variables = random_variables(resnet18())
    expected = {
        "torchvision": "conv1 layer2.0.downsample.0 layer2.1.bn2 fc",
        "d2l": "0.0 2.0.conv3 2.1.bn2 7",
        "d2l_class": "net.0.0 net.b3.0.conv3 net.b3.1.bn2 net.last.2",
        "d2l_package": "0 resnet_block2.0.conv3 resnet_block2.1.bn2 fc.1",
        "huggingface": "resnet.embedder.embedder.convolution "
        "resnet.encoder.stages.1.layers.0.shortcut.convolution "
        "resnet.encoder.stages.1.layers.1.layer.1.normalization classifier.1",
        "huggingface_base": "embedder.embedder.convolution "
        "encoder.stages.1.layers.0.shortcut.convolution "
        "encoder.stages.1.layers.1.layer.1.normalization classifier.1",
    }
    assert expected.keys() == LAYOUTS.keys()
    for layout, prefixes in expected.items():
        layers = {key.rpartition(".")[0] for key in to_torch(resnet18(), variables, layout)}
        assert set(prefixes.split()) <= layers


@pytest.mark.parametrize(
    ("flavour", "layout", "prefixes"),
    [
        ("torchvision", "torchvision", "conv1.0 conv1.1 conv1.6 bn1 layer2.0.downsample.1"),
        ("torchvision", "torchvision", "layer2.0.downsample.2"),
        ("torchvision", "huggingface_base", "encoder.stages.1.layers.0.shortcut.convolution"),
        ("torchvision", "huggingface_base", "encoder.stages.1.layers.0.shortcut.normalization"),
        ("d2l", "d2l", "0.0.0 0.0.1 0.0.6 0.1 2.0.conv3"),
    ],
)
def test_only_timm_numbers_a_pooling(flavour: str, layout: str, prefixes: str) -> None:
    model = build_model("resnet18d", flavour)
    layers = {key.rpartition(".")[0] for key in to_torch(model, random_variables(model), layout)}
    assert set(prefixes.split()) <= layers


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "net.", "backbone.0."])
def test_prefixes_of_wrapped_networks_are_recognised(prefix: str) -> None:
    net = d2l_resnet18()
    plain = from_torch(resnet18(), net.state_dict())
    wrapped = {prefix + key: value for key, value in net.state_dict().items()}
    assert_same(from_torch(resnet18(), wrapped), plain)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
@pytest.mark.parametrize("strays", [{"n_averaged": np.array(5)}, {"loss.centers": np.ones((7, 3))}])
def test_what_lies_beside_a_wrapped_network_is_left_behind_and_named(prefix, strays, caplog):
    caplog.set_level("INFO", "resnet_flax")
    wrapped = strays | {prefix + key: value for key, value in SMALL_STATE_DICT.items()}
    assert_same(from_torch(SMALL, wrapped), from_torch(SMALL, SMALL_STATE_DICT))
    assert caplog.messages == [f"left behind, being outside of {prefix}: {next(iter(strays))}"]


def test_a_prefix_of_half_of_the_keys_is_that_of_one_network_of_two():
    twice = {
        f"{name}.{key}": value
        for name in ("student", "teacher")
        for key, value in SMALL_STATE_DICT.items()
    }
    with pytest.raises(InputError, match=r"several networks, in student\., teacher\.") as caught:
        from_torch(SMALL, twice)
    assert len(str(caught.value)) < 800


def test_what_is_surplus_in_the_network_is_refused_in_a_wrapped_one_too():
    wrapped = {f"module.{key}": value for key, value in SMALL_STATE_DICT.items()}
    with pytest.raises(InputError, match=r"do not fit: surplus: module\.extra\.weight$"):
        from_torch(SMALL, wrapped | {"module.extra.weight": np.ones(3), "n_averaged": np.ones(1)})


def test_a_list_of_names_has_its_room():
    assert listed(["a", "b\n"]) == r"a, b\n"
    assert listed(["a" * 300]) == "a" * 200
    assert listed(["a" * 150, "b" * 50, "c"]) == "a" * 150 + ", " + "b" * 50 + " and 1 more"
