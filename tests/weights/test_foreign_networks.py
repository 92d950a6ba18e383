"""timm's and transformers' networks, random-initialised, converted and compared in eval mode."""

from typing import Any

import jax
import numpy as np
import pytest
import torch

from resnet_flax import build_model
from resnet_flax.weights import from_torch, load_safetensors, save_safetensors, to_torch
from tests.support.foreign import import_timm
from tests.support.torch_reference import randomise_norms

pytestmark = pytest.mark.foreign


def assert_same_logits(net: torch.nn.Module, model: Any, channels: int, tmp_path: Any) -> None:
    """Exports, converts, compares, and hands the weights back."""
    torch.manual_seed(0)
    randomise_norms(net).eval()
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {key: value.numpy() for key, value in net.state_dict().items()})
    variables = from_torch(model, load_safetensors(path))
    images = torch.rand(2, channels, 65, 65)
    with torch.no_grad():
        expected = net(images)
    expected = getattr(expected, "logits", expected).numpy()
    logits = jax.jit(model.apply)(variables, images.permute(0, 2, 3, 1).numpy())
    # float32 rounding of up to 152 layers, as a share of the largest logit.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    layout = "huggingface" if hasattr(net, "classifier") else "torchvision"
    written = to_torch(model, variables, layout)
    net.load_state_dict({key: torch.from_numpy(v) for key, v in written.items()}, strict=True)


def slow(*names: Any) -> list[Any]:
    return [pytest.param(*name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    ("name", "ours", "channels", "fields"),
    [
        ("resnet18", "resnet18", 3, {}),
        ("resnet18", "resnet18", 1, {}),
        ("resnet50", "resnet50", 3, {}),
        ("resnet18d", "resnet18d", 3, {}),
        ("resnet26d", "resnet26d", 1, {}),
        ("resnext50_32x4d", "resnext50_32x4d", 3, {}),
        *slow(
            ("resnet34", "resnet34", 3, {}),
            ("resnet101", "resnet101", 3, {}),
            ("resnet152", "resnet152", 3, {}),
            ("wide_resnet50_2", "resnet50", 3, {"width_multiplier": 2}),
            *(
                (name, name, 3, {})
                for name in ("resnet26", "resnet34d", "resnet50d", "resnet101d", "resnet152d")
            ),
            *((f"resnext101_{kind}", f"resnext101_{kind}", 3, {}) for kind in ("32x8d", "64x4d")),
            *((f"wide_resnet{n}_2", f"wide_resnet{n}_2", 3, {}) for n in (50, 101)),
        ),
    ],
)
def test_timm(name: str, ours: str, channels: int, fields: Any, tmp_path: Any) -> None:
    net = import_timm().create_model(name, pretrained=False, in_chans=channels, num_classes=10)
    assert_same_logits(net, build_model(ours, "torchvision", **fields), channels, tmp_path)


@pytest.mark.parametrize(
    ("output_stride", "replaced"),
    [(8, (False, True, True)), *slow((16, (False, False, True)))],
)
def test_timms_output_stride(output_stride: int, replaced: Any, tmp_path: Any) -> None:
    net = import_timm().create_model("resnext50_32x4d", num_classes=10, output_stride=output_stride)
    model = build_model("resnext50_32x4d", "torchvision", replace_stride_with_dilation=replaced)
    assert_same_logits(net, model, 3, tmp_path)


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("resnext50_32x4d", None),
        *slow(("wide_resnet50_2", None), ("resnet50", [False, True, True])),
    ],
)
def test_torchvision(name: str, replaced: Any, tmp_path: Any) -> None:
    import_timm()  # torchvision's operators are declared, where they do not load
    import torchvision

    fields = {"replace_stride_with_dilation": replaced} if replaced else {}
    net = getattr(torchvision.models, name)(num_classes=10, **fields)
    assert_same_logits(net, build_model(name, "torchvision", **fields), 3, tmp_path)


@pytest.mark.parametrize(
    ("name", "layer_type", "depths", "v1"),
    [
        ("resnet18", "basic", [2, 2, 2, 2], False),
        ("resnet50", "bottleneck", [3, 4, 6, 3], False),
        *slow(
            ("resnet50", "bottleneck", [3, 4, 6, 3], True),
            ("resnet34", "basic", [3, 4, 6, 3], False),
            ("resnet101", "bottleneck", [3, 4, 23, 3], False),
            ("resnet152", "bottleneck", [3, 8, 36, 3], False),
        ),
    ],
)
def test_transformers(name: str, layer_type: str, depths: Any, v1: bool, tmp_path: Any) -> None:
    import_timm()  # transformers imports torchvision if it finds it
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
    config = ResNetConfig(
        layer_type=layer_type,
        depths=depths,
        hidden_sizes=widths,
        num_labels=10,
        downsample_in_bottleneck=v1,
    )
    model = build_model(name, "torchvision", stride_first=v1)
    assert_same_logits(ResNetForImageClassification(config), model, 3, tmp_path)


def test_transformers_loads_what_is_written(tmp_path: Any) -> None:
    import_timm()
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=10
    )
    net = ResNetForImageClassification(config)
    model = build_model("resnet18", "torchvision")
    variables = from_torch(model, net.state_dict())
    config.save_pretrained(tmp_path)
    save_safetensors(tmp_path / "model.safetensors", to_torch(model, variables, "huggingface"))
    loaded = ResNetForImageClassification.from_pretrained(tmp_path)
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
