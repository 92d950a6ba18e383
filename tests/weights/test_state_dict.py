"""Weights between PyTorch and Flax: round trips, dtypes, adaptations, and what does not fit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_flax import ARCHITECTURES, FLAVOURS, Residual, ResNet, build_model, resnet18
from resnet_flax.errors import InputError
from resnet_flax.weights import LAYOUTS, from_torch, load_safetensors, save_safetensors, to_torch
from resnet_flax.weights.state_dict import match
from tests.support.state_dicts import (
    SMALL,
    SMALL_STATE_DICT,
    TINY,
    assert_same,
    random_variables,
    tiny_state_dict,
)
from tests.support.torch_reference import Residual as TorchResidual
from tests.support.torch_reference import TorchvisionResNet, d2l_resnet18

# The others' layers are those of these, and of small networks in test_transfer.py.
QUICK = ("resnet8", "resnet18", "resnet50")


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in ARCHITECTURES],
)
def test_round_trip_is_bit_exact_in_every_layout(name: str, flavour: str) -> None:
    model = build_model(name, flavour)
    variables = random_variables(model)
    for layout in LAYOUTS:
        assert_same(from_torch(model, to_torch(model, variables, layout)), variables)


@pytest.mark.parametrize(
    ("net", "model", "layout"),
    [
        (d2l_resnet18(), resnet18(), "d2l"),
        (TorchvisionResNet((2, 2, 2, 2), 1, 10), resnet18("torchvision"), "torchvision"),
        (
            TorchvisionResNet((2, 2, 2, 2), 1, 10, "deep", average_shortcut=True),
            build_model("resnet18d", "torchvision"),
            "torchvision",
        ),
    ],
)
def test_pytorch_loads_what_is_written(net: Any, model: ResNet, layout: str) -> None:
    written = to_torch(model, random_variables(model), layout, num_batches_tracked=7)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in written.items()}, strict=True)
    assert {int(v) for k, v in net.state_dict().items() if k.endswith("tracked")} == {7}
    for key, value in net.state_dict().items():
        assert np.array_equal(value.numpy(), written[key])


def test_kernels_are_transposed() -> None:
    state_dict = tiny_state_dict()
    params = from_torch(TINY, state_dict)["params"]
    conv = state_dict["layer2.0.conv1.weight"].numpy()
    assert np.array_equal(params["layer2"]["0"]["conv1"]["kernel"], conv.transpose(2, 3, 1, 0))
    assert np.array_equal(params["fc"]["kernel"], state_dict["fc.weight"].numpy().T)


def test_blocks_of_d2l_and_torchvision_convert() -> None:
    net = TorchResidual(3, 6, use_1x1conv=True, strides=2)
    model = Residual(6, use_1x1conv=True, strides=2)
    variables = from_torch(model, net.state_dict(), in_channels=3)
    written = to_torch(model, variables, "d2l")
    assert written.keys() == net.state_dict().keys()
    assert_same(from_torch(model, to_torch(model, variables), in_channels=3), variables)


def test_counters_left_behind_are_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "resnet_flax")
    state_dict = tiny_state_dict()
    from_torch(TINY, state_dict)
    assert caplog.messages == []
    state_dict["bn1.num_batches_tracked"] += 5
    from_torch(TINY, state_dict)
    assert caplog.messages == ["num_batches_tracked: left behind, 5"]
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    state_dict = tiny_state_dict()
    state_dict["bn1.num_batches_tracked"] += 5
    from_torch(TINY, state_dict, adapt_stem="sum", new_head=0)
    assert capfd.readouterr() == ("", "")


def test_a_state_dict_is_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    state_dict = tiny_state_dict()
    expected = from_torch(TINY, state_dict)
    matched = match(TINY, state_dict, in_channels=3)
    monkeypatch.delattr("resnet_flax.weights.state_dict.match_keys")
    monkeypatch.delattr("resnet_flax.weights.state_dict.variable_shapes")
    assert_same(from_torch(TINY, matched), expected)


def test_state_dicts_without_counters_are_taken() -> None:
    state_dict = {k: v for k, v in tiny_state_dict().items() if not k.endswith("tracked")}
    assert_same(from_torch(TINY, state_dict), from_torch(TINY, tiny_state_dict()))


def test_arrays_are_new() -> None:
    state_dict = tiny_state_dict()
    variables = from_torch(TINY, state_dict)
    before = jax.tree.map(np.array, variables)
    written = to_torch(TINY, variables)
    for value in state_dict.values():
        value.zero_()
    for value in written.values():
        assert value.flags.c_contiguous
        value[...] = 0
    assert_same(variables, jax.tree.map(jnp.asarray, before))


def test_numpy_and_lists_are_taken() -> None:
    state_dict = tiny_state_dict()
    arrays = {key: value.numpy() for key, value in state_dict.items()}
    arrays["fc.bias"] = arrays["fc.bias"].tolist()
    assert_same(from_torch(TINY, arrays), from_torch(TINY, state_dict))


def test_nan_and_infinity_pass() -> None:
    state_dict = tiny_state_dict()
    state_dict["fc.bias"][:] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    bias = from_torch(TINY, state_dict)["params"]["fc"]["bias"]
    np.testing.assert_array_equal(bias, [np.nan, np.inf, -np.inf])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_kept_or_changed_as_asked(dtype: str, tmp_path: Path) -> None:
    half = {
        key: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        for key, value in tiny_state_dict().items()
    }
    kept = from_torch(TINY, half, dtype="keep")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {dtype}
    by_default = from_torch(TINY, half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(by_default)} == {"float32"}
    assert_same(jax.tree.map(lambda leaf: leaf.astype("float32"), kept), by_default)
    asked = from_torch(TINY, half, dtype=jnp.float16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(asked)} == {"float16"}

    path = tmp_path / "model.safetensors"
    save_safetensors(path, to_torch(TINY, kept))
    assert_same(from_torch(TINY, load_safetensors(path), dtype="keep"), kept)
    from safetensors.torch import load_file

    for key, value in load_file(path).items():
        assert value.dtype == half[key].dtype
        assert torch.equal(value, half[key])


def test_float64_needs_64_bits_in_jax() -> None:
    double = {k: v.double() if v.is_floating_point() else v for k, v in tiny_state_dict().items()}
    with pytest.raises(InputError, match="jax_enable_x64"):
        from_torch(TINY, double, dtype="keep")
    with jax.enable_x64(True):
        kept = from_torch(TINY, double, dtype="keep")
        assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {"float64"}


def test_every_fault_is_named_in_one_line() -> None:
    state_dict = tiny_state_dict()
    del state_dict["bn1.weight"], state_dict["layer1.0.conv1.weight"]
    state_dict["layer1.0.conv1.bias"] = torch.zeros(64)
    state_dict["extra"] = torch.zeros(1)
    state_dict["fc.weight"] = state_dict["fc.weight"].T
    state_dict["fc.bias"] = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(InputError) as error:
        from_torch(TINY, state_dict)
    assert str(error.value) == (
        "the state dict and the model do not fit: missing: bn1.weight, layer1.0.conv1.weight; "
        "surplus: extra, layer1.0.conv1.bias; wrong shape: fc.weight (128, 3), not (3, 128); "
        "wrong dtype: fc.bias int8"
    )


def test_a_checkpoint_of_the_other_flavour_is_refused() -> None:
    net = TorchvisionResNet((2, 2, 2, 2), 1, 10)
    with pytest.raises(
        InputError, match=r"missing: conv1\.bias.*surplus: layer2\.0\.downsample\.1"
    ):
        from_torch(resnet18(), net.state_dict())


@pytest.mark.parametrize("value", [None, [], "weights", torch.nn.Linear(1, 1)])
def test_what_is_no_state_dict_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="a state dict maps keys to tensors"):
        from_torch(TINY, value)


@pytest.mark.parametrize("layout", ["timm", ""])
def test_unknown_layouts_are_refused(layout: str) -> None:
    with pytest.raises(InputError, match=r"unknown layout .* choose from torchvision, d2l"):
        to_torch(TINY, random_variables(TINY), layout)


def test_variables_of_another_model_are_refused() -> None:
    variables = random_variables(TINY)
    del variables["params"]["bn1"]["scale"]
    variables["params"]["fc"]["kernel"] = jnp.zeros((128, 4))
    with pytest.raises(InputError) as error:
        to_torch(TINY, variables)
    assert str(error.value) == (
        "the variables and the model do not fit: missing: params/bn1/scale; "
        "wrong shape: params/fc/kernel (128, 4), not (128, 3)"
    )


def test_a_missing_stem_is_named() -> None:
    state_dict, variables = tiny_state_dict(), random_variables(TINY)
    del state_dict["conv1.weight"], variables["params"]["conv1"]
    with pytest.raises(InputError, match=r"missing: conv1\.weight$"):
        from_torch(TINY, state_dict)
    with pytest.raises(InputError, match=r"missing: params/conv1/kernel$"):
        to_torch(TINY, variables)


def test_a_deep_stem_is_adapted_too() -> None:
    deep = TINY.clone(stem="deep")
    state_dict = TorchvisionResNet((1, 1), 3, 3, "deep").state_dict()
    kernel = from_torch(deep, state_dict)["params"]["conv1"]["0"]["kernel"]
    assert kernel.shape == (3, 3, 3, 32)
    summed = from_torch(deep, state_dict, adapt_stem="sum")["params"]["conv1"]["0"]["kernel"]
    np.testing.assert_allclose(summed, kernel.sum(2, keepdims=True), atol=1e-6)
    with pytest.raises(InputError, match=r"conv1.0.weight \(32, 3, 3, 3\), not \(32, 1, 3, 3\)"):
        from_torch(deep, state_dict, in_channels=1)


def logits(variables: Any, images: np.ndarray, model: ResNet = TINY) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(variables, images))


def test_input_channels_are_the_checkpoints() -> None:
    for channels in (1, 2, 3):
        kernel = from_torch(TINY, tiny_state_dict(channels))["params"]["conv1"]["kernel"]
        assert kernel.shape == (7, 7, channels, 64)
    with pytest.raises(InputError, match=r"conv1.weight \(64, 3, 7, 7\), not \(64, 1, 7, 7\)"):
        from_torch(TINY, tiny_state_dict(3), in_channels=1)


def test_a_summed_stem_sees_grey_images_as_the_old_one_saw_them_in_rgb(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "resnet_flax")
    grey = np.random.default_rng(0).random((2, 32, 32, 1), np.float32)
    state_dict = tiny_state_dict(3)
    summed = from_torch(TINY, state_dict, adapt_stem="sum")
    expected = logits(from_torch(TINY, state_dict), grey.repeat(3, -1))
    np.testing.assert_allclose(logits(summed, grey), expected, atol=1e-5)
    assert caplog.messages == ["stem: 3 input channels summed into one"]


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 6), (3, 4)])
def test_a_replicated_stem_keeps_the_output_for_equal_channels(
    old: int, new: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "resnet_flax")
    grey = np.random.default_rng(0).random((2, 32, 32, 1), np.float32)
    state_dict = tiny_state_dict(old)
    # With equal kernels every repetition weighs the same, 4 of 3 included.
    state_dict["conv1.weight"][:] = state_dict["conv1.weight"].mean(1, keepdim=True)
    replicated = from_torch(TINY, state_dict, adapt_stem="replicate", in_channels=new)
    expected = logits(from_torch(TINY, state_dict), grey.repeat(old, -1))
    np.testing.assert_allclose(logits(replicated, grey.repeat(new, -1)), expected, atol=1e-5)
    assert caplog.messages == [
        f"stem: {old} input channels replicated to {new}, scaled by their ratio"
    ]


def test_a_new_head_is_drawn_as_the_model_draws_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "resnet_flax")
    state_dict = tiny_state_dict(num_classes=1000)
    with pytest.raises(InputError, match=r"fc.bias \(1000,\), not \(3,\)"):
        from_torch(TINY, state_dict)
    variables = from_torch(TINY, state_dict, new_head=0)
    assert caplog.messages == [
        "dense layer: left behind fc.weight, fc.bias",
        "dense layer: drawn anew for 3 classes",
    ]
    head = variables["params"]["fc"]
    assert head["kernel"].shape == (128, 3)
    assert np.abs(head["kernel"]).max() <= (6 / 131) ** 0.5  # Xavier's bound
    assert np.abs(head["kernel"]).min() > 0
    assert_same(head, from_torch(TINY, state_dict, new_head=jax.random.key(0))["params"]["fc"])
    assert np.array_equal(variables["params"]["bn1"]["scale"], state_dict["bn1.weight"])


def test_the_head_is_dropped_on_request_only() -> None:
    features = TINY.clone(num_classes=0)
    with pytest.raises(InputError, match=r"surplus: fc\.bias, fc\.weight"):
        from_torch(features, tiny_state_dict())
    assert "fc" not in from_torch(features, tiny_state_dict(), drop_head=True)["params"]
    headless = tiny_state_dict(num_classes=0)
    assert "fc" in from_torch(TINY, headless, new_head=1)["params"]
    with pytest.raises(InputError, match=r"missing: fc\.bias, fc\.weight"):
        from_torch(TINY, headless)
    with pytest.raises(InputError, match="num_classes > 0"):
        from_torch(features, headless, new_head=1)


@pytest.mark.parametrize(
    "request_",
    [
        {"adapt_stem": "replicate"},
        {"adapt_stem": "sum", "in_channels": 2},
        {"adapt_stem": "mean", "in_channels": 1},
    ],
)
def test_impossible_adaptations_are_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(InputError, match='adapt_stem is "sum"'):
        from_torch(TINY, tiny_state_dict(), **request_)


KEYS = sorted(key for key in SMALL_STATE_DICT if not key.endswith("tracked"))


@st.composite
def damaged_state_dicts(draw: Any) -> tuple[str, dict[str, Any]]:
    """A key, and a state dict in which something is wrong with it."""
    state_dict: dict[str, Any] = dict(SMALL_STATE_DICT)
    key = draw(st.sampled_from(KEYS))
    array = state_dict[key]
    other = draw(st.text(max_size=20).filter(lambda text: text not in SMALL_STATE_DICT))
    damage = draw(st.sampled_from(["drop", "rename", "add", "shape", "dtype", "value"]))
    if damage in ("drop", "rename"):
        del state_dict[key]
    if damage in ("rename", "add"):
        state_dict[other] = array
    if damage == "add":
        key = other
    if damage == "shape":
        shapes = [array[None], array[:-1], array.ravel()[:1], array[..., :0], np.float32(1)]
        # The number of input channels is free, so that the stem may only lose all of them.
        state_dict[key] = draw(st.sampled_from(shapes))
    if damage == "dtype":
        dtypes = [np.int8, np.int32, bool, np.complex64, object, "U8", ml_dtypes.float8_e5m2]
        state_dict[key] = array.astype(draw(st.sampled_from(dtypes)))
    if damage == "value":
        state_dict[key] = draw(st.sampled_from([None, "text", b"", [[1], [2, 3]], {}, object()]))
    return key, state_dict


@settings(max_examples=400, deadline=None, derandomize=True)
@given(damaged_state_dicts())
def test_damaged_state_dicts_are_refused(damaged: tuple[str, dict[str, Any]]) -> None:
    key, state_dict = damaged
    with pytest.raises(InputError) as error:
        from_torch(SMALL, state_dict)
    assert key.encode("unicode_escape").decode() in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# --- As public reports have it: the report, and what was done to a state dict.

PLAIN = {key: torch.from_numpy(value) for key, value in SMALL_STATE_DICT.items()}
OTHER = {key: value + 1 for key, value in PLAIN.items()}
ZERO = torch.zeros(1, dtype=torch.float64)


def counters(change: Any) -> dict[str, torch.Tensor]:
    return {k: change(v) if "num_batches" in k else v for k, v in PLAIN.items()}


@pytest.mark.parametrize(
    ("state_dict", "left"),
    [
        pytest.param(
            PLAIN | {"total_ops": ZERO, "fc.total_ops": ZERO, "fc.total_params": ZERO},
            "total_ops, fc.total_ops, fc.total_params",
            id="Lyken17/pytorch-OpCounter#82",
        ),
        pytest.param(
            PLAIN | {"layer1.0._extra_state": torch.zeros(0, dtype=torch.uint8)},
            "layer1.0._extra_state",
            id="NVIDIA/Megatron-LM#900",
        ),
        pytest.param(
            PLAIN | {f"ema_{key.replace('.', '_')}": value for key, value in OTHER.items()},
            "ema_conv1_weight, ",
            id="zkyseu/O2SFormer#23",
        ),
        pytest.param(
            {f"{part}.{k}": v for part in ("ema_model", "online_model") for k, v in PLAIN.items()}
            | {"initted": torch.ones(1), "step": torch.ones(1)},
            "ema_model.conv1.weight, ",
            id="lucidrains/ema-pytorch#39",
        ),
        pytest.param(
            {k.replace("r1.0.", "r1.0._checkpoint_wrapped_module."): v for k, v in PLAIN.items()},
            None,
            id="pytorch/pytorch#117399",
        ),
        pytest.param(
            {f"module.{k}".replace("r1.", "r1._orig_mod."): v for k, v in PLAIN.items()},
            None,
            id="pytorch/torchtitan#2622",
        ),
        pytest.param(counters(lambda v: v + 2.5), None, id="pytorch/pytorch#42964"),
        pytest.param(counters(lambda v: v.reshape(1) > 0), None, id="pytorch/pytorch#42964-bool"),
    ],
)
def test_what_is_reported_of_other_places_is_read(
    state_dict: dict[str, torch.Tensor], left: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "resnet_flax")
    expected = from_torch(SMALL, PLAIN)
    assert caplog.messages == []
    assert_same(from_torch(SMALL, state_dict), expected)
    assert (left is None) == (caplog.messages == [])
    assert left is None or caplog.messages[0].startswith("left behind, being ")
    assert left is None or f": {left}" in caplog.messages[0]


@pytest.mark.parametrize(
    ("state_dict", "told"),
    [
        pytest.param(
            {f"encoder_{part}.{k}": v for part in "qk" for k, v in PLAIN.items()},
            "the state dict holds several networks, in encoder_q., encoder_k.: choose one by "
            "`part`",
            id="facebookresearch/moco#84",
        ),
        pytest.param(
            PLAIN | {"fc.weight.bad_key": torch.ones(1)},
            "surplus: fc.weight.bad_key",
            id="pytorch/pytorch#123510",
        ),
        pytest.param(
            {k: v[:0] if v.ndim == 4 else v for k, v in PLAIN.items()},
            "wrong shape: conv1.weight (0, 3, 7, 7), not (64, 3, 7, 7)",
            id="huggingface/transformers#20082",
        ),
        pytest.param(
            PLAIN | {"fc.weight": PLAIN["fc.weight"].to(torch.float8_e4m3fn)},
            "wrong dtype: fc.weight float8_e4m3fn",
            id="safetensors/safetensors#683",
        ),
        pytest.param(
            counters(lambda v: v + float("nan")),
            "num_batches_tracked is no number of steps: cannot convert float NaN to integer",
            id="pytorch/pytorch#42964",
        ),
        pytest.param(
            {k.replace("fc.weight", "fc.weight_orig"): v for k, v in PLAIN.items()}
            | {"fc.weight_mask": torch.ones(1)},
            "missing: fc.weight; surplus: fc.weight_mask, fc.weight_orig",
            id="ahendriksen/msd_pytorch#3",
        ),
    ],
)
def test_what_is_reported_of_other_places_is_refused_by_name(
    state_dict: dict[str, torch.Tensor], told: str
) -> None:
    with pytest.raises(InputError) as caught:
        from_torch(SMALL, state_dict, in_channels=3)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 800
