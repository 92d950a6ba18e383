"""Each fault that ports have is planted in turn; `compare_with_torch` must find and name it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from resnet_flax import Bottleneck, Residual, ResNet, Stage
from resnet_flax.compare import Comparison, compare_with_torch
from resnet_flax.errors import InputError
from resnet_flax.nn.layers import BatchNorm, Conv
from resnet_flax.weights.state_dict import TO_FLAX, from_torch
from tests.support import torch_reference as reference

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """PyTorch's threads cost more than they bring on such small images."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def original(**fields: Any) -> torch.nn.Module:
    """Two blocks of torchvision's, the first of stride 2."""
    torch.manual_seed(0)
    return reference.randomise_norms(reference.torchvision_stage(4, 4, 2, 2, **fields))


def port(kind: Any = Residual, conv: Any = Conv, norm: Any = BatchNorm, **fields: Any) -> Stage:
    """The same in Flax, with layers and fields to choose."""
    fields = {"norm_shortcut": True, **fields}
    return Stage(4, 2, block=partial(kind, conv=partial(conv, use_bias=False), norm=norm, **fields))


def variables_of(net: torch.nn.Module, kind: Any = Residual) -> dict[str, Any]:
    return from_torch(port(kind), net.state_dict(), in_channels=4)


def compare(model: nn.Module, kind: Any = Residual, **options: Any) -> Comparison:
    net = original(bottleneck=kind is Bottleneck)
    return compare_with_torch(model, variables_of(net, kind), net, IMAGES, **options)


def found(comparison: Comparison) -> tuple[str | None, str | None]:
    return comparison.first_diverging_layer, comparison.likely_cause


# --- Layers as others write them.


def same_conv(features: int, size: int, strides: int = 1, padding: int = 0, **fields: Any) -> Any:
    return nn.Conv(features, (size, size), strides, padding="SAME", **fields)


class FlaxNorm(nn.BatchNorm):
    """Flax's own BN, called as ours."""

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # type: ignore[override]
        return super().__call__(x, use_running_average=not train)


class FrozenNorm(BatchNorm):
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return super().__call__(x, False)


class StoppedNorm(BatchNorm):
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return jax.lax.stop_gradient(super().__call__(x, train))


class ReluBeforeAdd(Residual):
    def add(self, shortcut: jax.Array, branch: jax.Array, train: bool) -> jax.Array:
        return super().add(shortcut, nn.relu(branch), train)


class ForgottenRelu(Residual):
    def dropout(self, x: jax.Array, train: bool) -> jax.Array:  # what comes before conv2
        return x - 1


# --- Faults.


@pytest.mark.parametrize("train", [True, False])
def test_equal_networks_do_not_diverge(train: bool) -> None:
    comparison = compare(port(), train=train)
    assert found(comparison) == (None, None)
    assert [row.layer for row in comparison.rows][:3] == ["0/conv1", "0/bn1", "0/conv2"]
    assert comparison.rows[-1].layer == ""
    assert all(row.alone.relative < 3e-6 for row in comparison.rows)
    assert all(row.gradient and row.gradient.relative < 1e-4 for row in comparison.rows)
    assert str(comparison).endswith("No layer diverges by more than 3e-05.")


@pytest.mark.parametrize(
    ("model", "layer", "cause", "detail"),
    [
        (port(conv=same_conv), "0/conv1", "padding", "'SAME' in Flax, (1, 1) in PyTorch"),
        (port(norm=partial(BatchNorm, momentum=0.01)), "0/bn1", "BN momentum", "0.01 in Flax"),
        (port(norm=partial(BatchNorm, epsilon=1e-3)), "0/bn1", "eps", "0.001 in Flax"),
        (port(norm=partial(FlaxNorm, momentum=0.9)), "0/bn1", "biased variance", "n - 1"),
        (port(norm=FrozenNorm), "0/bn1", "train mode", "running statistics though train=True"),
        (port(ReluBeforeAdd), "0", "between layers", "a ReLU"),
        (port(ForgottenRelu), "0/conv2", "between layers", "a ReLU"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_of_the_model_is_named(
    model: nn.Module, layer: str, cause: str, detail: str
) -> None:
    comparison = compare(model)
    assert found(comparison) == (layer, cause)
    assert detail in comparison.findings[0].detail


def test_flaxs_default_batch_norm_has_two_faults() -> None:
    comparison = compare(port(norm=FlaxNorm))
    causes = [finding.cause for finding in comparison.findings if finding.layer == "0/bn1"]
    assert causes == ["BN momentum", "biased variance"]
    assert "0.01 in Flax (momentum=0.99 of nn.BatchNorm), in PyTorch 0.1" in str(comparison)


def test_stride_placement_is_named() -> None:
    comparison = compare(port(Bottleneck, stride_first=True), Bottleneck, train=False)
    assert found(comparison) == ("0/conv1", "stride placement v1/v1.5")
    assert comparison.findings[0].detail == "Flax takes the step in 0/conv1, PyTorch in 0/conv2"
    assert len(comparison.findings) == 2


def test_strides_left_out_everywhere_are_no_matter_of_placement() -> None:
    def unstrided(features: int, size: int, _: int = 1, padding: int = 0, **fields: Any) -> Any:
        return Conv(features, size, 1, padding, **fields)

    comparison = compare(port(conv=unstrided))
    assert found(comparison) == ("0/conv1", "strides")


@pytest.mark.parametrize(
    ("axes", "how"), [((1, 0, 2, 3), "height and width"), ((0, 1, 3, 2), "input and output")]
)
def test_a_transposed_kernel_is_named(axes: tuple[int, ...], how: str) -> None:
    net = original()
    variables = variables_of(net)
    layer = variables["params"]["1"]["conv2"]
    layer["kernel"] = layer["kernel"].transpose(axes)
    comparison = compare_with_torch(port(), variables, net, IMAGES)
    assert found(comparison) == ("1/conv2", "transposed kernel")
    assert how in comparison.findings[0].detail
    assert len(comparison.findings) == 1


def test_a_missing_shortcut_norm_is_named() -> None:
    net = original()
    variables = variables_of(net)
    for collection in variables.values():
        del collection["0"]["downsample"]["1"]
    comparison = compare_with_torch(port(norm_shortcut=False), variables, net, IMAGES)
    assert found(comparison) == ("0.downsample.1", "missing shortcut norm")
    assert "none after PyTorch's 0.downsample.0" in comparison.findings[0].detail


def test_a_surplus_shortcut_norm_is_named() -> None:
    net = original()
    variables = variables_of(net)
    net[0].downsample[1] = torch.nn.Identity()
    comparison = compare_with_torch(port(), variables, net, IMAGES)
    assert found(comparison) == ("0/downsample/1", "surplus layer")


def test_other_weights_are_named() -> None:
    net = original()
    variables = variables_of(net)
    variables["params"]["0"]["bn2"]["bias"] += 1
    variables["batch_stats"]["1"]["bn1"]["mean"] += 1
    comparison = compare_with_torch(port(), variables, net, IMAGES)
    assert comparison.findings[0][:2] == ("0/bn2", "weights")
    assert comparison.findings[1][:2] == ("1/bn1", "weights")


def test_other_widths_are_told_as_shapes() -> None:
    model = port(width_multiplier=2)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    comparison = compare_with_torch(model, variables, original(), IMAGES, train=False)
    assert found(comparison) == ("0/conv1", "shape")
    assert comparison.findings[0].detail == "(2, 4, 4, 8) instead of (2, 4, 4, 4)"


def test_a_bias_left_behind_is_named() -> None:
    net = original(bias=True)
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.ones_(part.bias)
    weights = {
        key: value
        for key, value in net.state_dict().items()
        if value.ndim != 1 or "bn" in key or "downsample.1" in key
    }
    variables = from_torch(port(), weights, in_channels=4)
    comparison = compare_with_torch(port(), variables, net, IMAGES)
    assert found(comparison) == ("0/conv1", "bias")


def test_a_gradient_that_stops_is_found_in_float64() -> None:
    with jax.enable_x64(True):
        net = original().double()
        model = port(
            conv=partial(Conv, dtype="float64"), norm=partial(StoppedNorm, dtype="float64")
        )
        comparison = compare_with_torch(
            model,
            from_torch(model, net.state_dict(), in_channels=4, dtype="float64"),
            net,
            IMAGES.astype("float64"),
        )
    assert comparison.tolerance == 1e-9
    assert found(comparison) == ("1/bn2", "gradient")


# --- Other people's networks.


class SomeonesPort(nn.Module):
    """A stem with Flax's names and habits: the pooling pads one-sidedly."""

    pool_padding: Any = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        x = nn.Conv(8, (3, 3), 2, padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not training, momentum=0.9)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), self.pool_padding)
        x = nn.Conv(8, (1, 1))(x)
        return nn.Dense(3)(x.mean((1, 2)))


class SomeonesOriginal(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3, 2, 1, bias=False),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(inplace=True),
            torch.nn.MaxPool2d(3, 2, 1),
            torch.nn.Conv2d(8, 8, 1),
        )
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))


NAMES = {"Conv_0": "stem.0", "BatchNorm_0": "stem.1", "Conv_1": "stem.4", "Dense_0": "head"}


def someones(**fields: Any) -> tuple[nn.Module, dict[str, Any], torch.nn.Module]:
    torch.manual_seed(0)
    net, model = SomeonesOriginal(), SomeonesPort(**fields)
    variables = jax.jit(partial(model.init, training=True))(jax.random.key(0), IMAGES)
    parts = dict(net.named_modules())
    for ours, theirs in NAMES.items():
        for key, value in parts[theirs].named_parameters():
            array = value.detach().numpy().transpose(TO_FLAX[value.ndim])
            name = key if key == "bias" else "kernel" if value.ndim > 1 else "scale"
            variables["params"][ours][name] = jnp.array(array)
    return model, variables, net


def test_a_port_with_other_names_and_arguments() -> None:
    training = {"names": NAMES, "arguments": {"training": True}}
    comparison = compare_with_torch(*someones(), IMAGES, **training)
    assert found(comparison) == ("BatchNorm_0", "biased variance")
    evaluation = {"names": NAMES, "arguments": {"training": False}, "train": False}
    assert found(compare_with_torch(*someones(), IMAGES, **evaluation)) == (None, None)


def test_what_lies_between_layers_is_compared_too() -> None:
    options = {"names": NAMES, "arguments": {"training": False}, "train": False}
    comparison = compare_with_torch(*someones(pool_padding="SAME"), IMAGES, **options)
    assert found(comparison) == ("Conv_1", "padding")
    assert comparison.findings[0].detail == "max pooling with 'SAME' instead of 1"


@pytest.mark.parametrize("layout", ["d2l", "torchvision"])
def test_whole_networks_are_matched_by_name(layout: str) -> None:
    torch.manual_seed(0)
    images = IMAGES[..., :1]
    model: ResNet = ResNet((1,), num_classes=3, stem="cifar")
    if layout == "d2l":
        net: Any = torch.nn.Sequential(
            torch.nn.Sequential(
                torch.nn.Conv2d(1, 64, 3, 1, 1),
                torch.nn.BatchNorm2d(64),
                torch.nn.ReLU(inplace=True),
            ),
            reference.resnet_block(64, 64, 1, first_block=True),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(64, 3),
        )
    else:
        net = reference.TorchvisionResNet((1,), 1, 3, "cifar", bias=True, norm_shortcut=False)
    state_before = {key: value.clone() for key, value in net.eval().state_dict().items()}
    comparison = compare_with_torch(model, from_torch(model, net.state_dict()), net, images)
    assert found(comparison) == (None, None)
    names = {row.layer: row.torch_name for row in comparison.rows}
    assert names["layer1/0/conv2"] == ("1.0.conv2" if layout == "d2l" else "layer1.0.conv2")
    assert names["layer1/0"] == ("1.0" if layout == "d2l" else "layer1.0")
    assert names["fc"] == ("4" if layout == "d2l" else "fc")
    assert not net.training
    assert all(torch.equal(value, state_before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_groups_a_deep_stem_and_a_pooled_shortcut_are_followed() -> None:
    fields: dict[str, Any] = {"stem": "deep", "channels": 8, "groups": 2, "average_shortcut": True}
    net = reference.TorchvisionResNet((1,), 1, 3, bottleneck=True, **fields)
    model = ResNet((1,), Bottleneck, 3, use_bias=False, norm_shortcut=True, **fields)
    comparison = compare_with_torch(
        model, from_torch(model, net.state_dict()), net, IMAGES[..., :1]
    )
    assert found(comparison) == (None, None)
    layers = {row.layer for row in comparison.rows}
    assert {"conv1/0", "conv1/6", "layer1/0/downsample/1", "layer1/0/conv2"} <= layers


# --- The table, and misuse.


def test_the_table_fits_a_terminal() -> None:
    comparison = compare(port(norm=partial(BatchNorm, epsilon=1e-3)))
    lines = str(comparison).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line.endswith("<--")] == ["0/bn1"]
    assert lines[-3:] == [
        "First diverging layer: 0/bn1",
        "Likely cause: eps: 0.001 in Flax, 1e-05 in PyTorch",
        "Further on: 4 x eps",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_module": {}}, "torch_module is a dict, not a torch.nn.Module"),
        ({"torch_module": torch.nn.ReLU()}, "has no parameters"),
        ({"images": np.zeros((1, 8, 8, 4), np.uint8)}, "must be floating point, not uint8"),
        ({"images": IMAGES[..., :3]}, "the Flax model fails: "),
        ({"variables": {}}, 'variables must be {"params": ...'),
        ({"arguments": {"training": True}}, "the Flax model fails: .*training"),
        ({"names": {"0/conv9": "0.conv1", "0/conv1": "9"}}, "not called .*: 0/conv9, 9"),
        ({"model": nn.Sequential([lambda x, train: [x]])}, "something else than one array"),
        ({"torch_module": torch.nn.Conv2d(3, 4, 1)}, "the PyTorch module fails on the images: "),
        ({"torch_module": torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1))}, "no layer with weights"),
    ],
)
def test_misuse_is_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    net = original()
    given = {"model": port(), "variables": variables_of(net), "torch_module": net} | changes
    with pytest.raises(InputError, match=message) as caught:
        compare_with_torch(**{"images": IMAGES, **given})
    assert "\n" not in str(caught.value)


def test_pytorch_computes_without_onednn_and_has_it_back() -> None:
    # oneDNN's gradients on transposed images end the process on AVX2 processors.
    class Watched(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.mkldnn.enabled)
            return super().forward(x)

    seen: list[bool] = []
    net = Watched(4, 4, 1, stride=2, bias=False)
    variables = {"params": {"kernel": net.weight.detach().numpy().transpose(2, 3, 1, 0)}}
    before = torch.backends.mkldnn.enabled
    comparison = compare_with_torch(
        Conv(4, 1, 2, use_bias=False), variables, net, IMAGES, arguments={}
    )
    assert comparison.findings == ()
    assert (seen, torch.backends.mkldnn.enabled) == ([False], before)
