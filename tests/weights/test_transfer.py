"""Which network a checkpoint is of, and a start from it for another."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from resnet_flax import Bottleneck, ResNet, build_model
from resnet_flax.errors import InputError
from resnet_flax.weights import (
    LAYOUTS,
    guess_model,
    keys,
    load_safetensors,
    save_safetensors,
    start_from,
    state_dict,
    to_torch,
    variable_shapes,
)

TORCHVISION = {"use_bias": False, "norm_shortcut": True}


def network(**fields) -> ResNet:
    return ResNet((1, 1), **{"stem": "cifar", "channels": 8, "num_classes": 4, **fields})


def random_variables(model: ResNet, channels: int = 1) -> dict:
    """Drawn by NumPy, since a compiled initialisation takes seconds."""
    generator = np.random.default_rng(0)
    shapes = variable_shapes(model, channels)
    leaves = {
        leaf: jnp.asarray(generator.uniform(0.5, 1, spec.shape) / spec.shape[0], jnp.float32)
        for leaf, spec in shapes.items()
    }
    return unflatten_dict(leaves)


@pytest.fixture(autouse=True)
def logged(caplog) -> None:
    caplog.set_level("INFO", "resnet_flax")


def start(path, model: ResNet, channels: int = 1) -> dict:
    return start_from(str(path), load_safetensors(path), model, channels=channels, seed=5)


D = {"stem": "deep", "average_shortcut": True}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        TORCHVISION,
        {"block": Bottleneck, **TORCHVISION},
        {**TORCHVISION, **D},
        {"block": Bottleneck, "groups": 2, **D},
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_any_layout(tmp_path, caplog, layout, fields):
    model = network(**fields)
    expected = random_variables(model)
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, to_torch(model, expected, layout))
    chex.assert_trees_all_equal(start(path, model), expected)
    assert caplog.messages == [f"start from {path}"]  # and nothing adapted


@pytest.fixture
def coloured(tmp_path):
    """Weights for three channels and four classes."""
    variables = random_variables(network(), channels=3)
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, to_torch(network(), variables))
    return path, variables["params"]


def test_another_number_of_classes_draws_a_new_dense_layer(coloured, caplog):
    path, old = coloured
    new = start(path, network(num_classes=7), channels=3)["params"]
    assert new["fc"]["kernel"].shape == (16, 7)
    assert np.asarray(new["fc"]["kernel"]).std() > 0.1
    chex.assert_trees_all_equal(new["layer2"], old["layer2"])
    assert caplog.messages == [
        f"start from {path}",
        "dense layer: left behind fc.weight, fc.bias",
        "dense layer: drawn anew for 7 classes",
    ]


def test_weights_without_a_dense_layer(tmp_path, caplog):
    headless = network(num_classes=0)
    path = tmp_path / "weights.safetensors"
    old = random_variables(headless)
    save_safetensors(path, to_torch(headless, old, "huggingface_base"))
    new = start(path, network())
    chex.assert_trees_all_equal(new["params"]["layer2"], old["params"]["layer2"])
    assert caplog.messages[-1] == "dense layer: drawn anew for 4 classes"


def test_coloured_weights_for_grey_images(coloured, caplog):
    path, old = coloured
    new = start(path, network())["params"]
    kernels = (params["conv1"]["kernel"] for params in (new, old))
    np.testing.assert_allclose(next(kernels), next(kernels).sum(2, keepdims=True), rtol=1e-6)
    assert caplog.messages[1:] == ["stem: 3 input channels summed into one"]


def test_grey_weights_for_coloured_images(tmp_path, caplog):
    old = random_variables(network())
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, to_torch(network(), old))
    new = start(path, network(), channels=3)
    kernel = old["params"]["conv1"]["kernel"]
    np.testing.assert_allclose(new["params"]["conv1"]["kernel"], np.tile(kernel, (1, 1, 3, 1)) / 3)
    assert caplog.messages[1:] == ["stem: 1 input channels replicated to 3, scaled by their ratio"]


def test_the_keys_of_a_start_are_matched_once(coloured, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return keys.match_keys(*arguments)

    monkeypatch.setattr(state_dict, "match_keys", counted)
    start(coloured[0], network(num_classes=7))
    assert len(calls) == 1


def test_the_wrong_flavour_is_told(coloured):
    path, _ = coloured
    with pytest.raises(InputError) as error:
        start(path, network(**TORCHVISION), channels=3)
    assert str(error.value) == (
        f"{path} is of another flavour: its convolutions have biases; choose `flavour` to fit"
    )
    other = network(**TORCHVISION)
    save_safetensors(path, to_torch(other, random_variables(other)))
    with pytest.raises(InputError, match="its convolutions have no biases; choose `flavour`"):
        start(path, network())


def test_files_of_other_networks(coloured, tmp_path):
    path, _ = coloured
    other = tmp_path / "other.safetensors"
    save_safetensors(other, {f"weight{i}": np.zeros(3, np.float32) for i in range(1000)})
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for model, file, words in [
        (network(channels=16), path, "wrong shape: "),
        (network(), other, "do not fit: missing: "),
        (network(), tmp_path / "junk.safetensors", "is damaged or not a safetensors file"),
        (network(), tmp_path / "absent.safetensors", "cannot read"),
    ]:
        with pytest.raises(InputError) as caught:
            start(file, model, channels=3)
        line = str(caught.value)
        assert words in line
        assert str(file) in line
        assert "--" not in line
        assert len(line) < 1300
        assert line.isprintable()


@pytest.mark.parametrize("flavour", ["d2l", "torchvision"])
@pytest.mark.parametrize("classes", [0, 7])
def test_flavour_and_classes_are_the_checkpoints_in_any_layout(flavour: str, classes: int) -> None:
    model = build_model("resnet18", flavour, num_classes=classes)
    variables = random_variables(model)
    for layout in LAYOUTS:
        tensors = to_torch(model, variables, layout)
        assert guess_model("resnet18", tensors) == model
        wrapped = {f"module.{key}": value for key, value in tensors.items()}
        assert guess_model("resnet18", wrapped) == model
    other = guess_model("resnet50", tensors, "torchvision", stem="cifar", width_multiplier=2.0)
    assert other == build_model(
        "resnet50", "torchvision", num_classes=classes, stem="cifar", width_multiplier=2.0
    )
    assert guess_model("resnet18", {}) == build_model("resnet18", "torchvision", num_classes=0)


FAMILY = [
    ("resnext50_32x4d", "resnet50"),
    ("wide_resnet50_2", "resnext50_32x4d"),
    ("resnet50", "wide_resnet50_2"),
    ("resnet18d", "resnet18"),
    ("resnet18", "resnet18"),
]


def torch_shapes(model: ResNet) -> dict:
    """A state dict of zeros that take no memory."""
    shapes = variable_shapes(model, 3)
    return {
        key: np.broadcast_to(np.float32(0), shapes[leaf].shape).transpose(
            state_dict.TO_TORCH[len(shapes[leaf].shape)]
        )
        for leaf, key in keys.torch_keys(shapes, "torchvision").items()
    }


def test_what_lies_beside_a_network_tells_nothing_of_it():
    model = build_model("resnet18", "torchvision", num_classes=5)
    tensors = {f"model.{key}": value for key, value in torch_shapes(model).items()}
    loss = {"loss.centers": np.ones((7, 3)), "loss.conv.weight": np.ones((3, 3, 1, 1))}
    assert guess_model("resnet18", loss | {"loss.conv.bias": np.ones(3)} | tensors) == model


@pytest.mark.parametrize(("name", "called"), FAMILY)
def test_groups_widths_and_a_deep_stem_are_told_by_the_shapes(name, called, caplog):
    model = build_model(name, "torchvision", num_classes=5)
    assert guess_model(called, torch_shapes(model)) == model
    assert len(caplog.messages) == (name != called)


def test_what_the_shapes_tell_is_said(caplog):
    guess_model("resnet50", torch_shapes(build_model("resnext50_32x4d", "torchvision")))
    assert caplog.messages == [
        "the weights are those of resnet50 with groups=32, width_per_group=4"
    ]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("resnet18", {"width_multiplier": 1.3}),
        ("resnet50", {"width_multiplier": 1.3}),
        ("resnet50", {"channels": 48}),
    ],
)
def test_other_widths_fit_what_they_were_told_by(name, fields):
    model = build_model(name, "torchvision", **fields)
    tensors = torch_shapes(model)
    guessed = guess_model(name, tensors)
    assert variable_shapes(guessed, 3) == variable_shapes(model, 3)
    assert guess_model(name, tensors, **fields) == model


def test_a_stem_that_could_be_one_of_two_is_asked_for():
    tensors = torch_shapes(build_model("resnet18", "torchvision", stem="cifar"))
    for name in ("resnet18", "resnet18d"):
        with pytest.raises(InputError, match="which `stem` has kernels of 3x3, cifar or small"):
            guess_model(name, tensors)
    assert guess_model("resnet18", tensors, stem="cifar").stem == "cifar"
    assert guess_model("resnet8", torch_shapes(build_model("resnet8"))) == build_model("resnet8")
