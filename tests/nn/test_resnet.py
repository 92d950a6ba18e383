import dataclasses
import json
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import resnet_flax
from resnet_flax import Bottleneck, Residual, ResNet, Stage, build_model, resnet18
from resnet_flax.errors import InputError
from resnet_flax.nn.resnet import describe_model, model_from_description

KEY = jax.random.key(0)


def shapes(model: ResNet, channels: int = 1, size: int = 64) -> dict:
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, size, size, channels)))


def parameter_count(model: ResNet, channels: int) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, channels)["params"]))


def test_the_texts_two_residual_blocks():
    images = jnp.ones((4, 6, 6, 3))
    same, _ = jax.jit(Residual(3).init_with_output)(KEY, images)
    halved, _ = jax.jit(Residual(6, use_1x1conv=True, strides=2).init_with_output)(KEY, images)
    assert same.shape == (4, 6, 6, 3)
    assert halved.shape == (4, 3, 3, 6)


@pytest.mark.parametrize(
    ("name", "flavour", "channels", "classes", "count"),
    [
        ("resnet18", "d2l", 1, 10, 11_178_378),
        ("resnet18", "torchvision", 3, 1000, 11_689_512),
        ("resnet34", "torchvision", 3, 1000, 21_797_672),
        ("resnet50", "torchvision", 3, 1000, 25_557_032),
        ("resnet101", "torchvision", 3, 1000, 44_549_160),
        ("resnet152", "torchvision", 3, 1000, 60_192_808),
        ("resnext50_32x4d", "torchvision", 3, 1000, 25_028_904),
        ("resnext101_32x8d", "torchvision", 3, 1000, 88_791_336),
        ("resnext101_64x4d", "torchvision", 3, 1000, 83_455_272),
        ("wide_resnet50_2", "torchvision", 3, 1000, 68_883_240),
        ("wide_resnet101_2", "torchvision", 3, 1000, 126_886_696),
    ],
)
def test_parameter_counts(name, flavour, channels, classes, count):
    assert parameter_count(build_model(name, flavour, num_classes=classes), channels) == count


def test_a_width_multiplier_of_two_is_128_channels_per_group():
    by_factor, by_group = (
        shapes(build_model("resnet50", "torchvision", **width), 3)
        for width in ({"width_multiplier": 2.0}, {"width_per_group": 128})
    )
    assert by_factor == by_group


def test_submodules_carry_torchvisions_names():
    params = shapes(resnet18("torchvision"))["params"]
    assert set(params) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}
    assert set(params["layer2"]["0"]) == {"conv1", "bn1", "conv2", "bn2", "downsample"}
    assert set(params["layer2"]["0"]["downsample"]) == {"0", "1"}
    assert set(shapes(resnet18())["params"]["layer2"]["0"]["downsample"]) == {"0"}
    assert "downsample" not in params["layer1"]["0"]


def test_the_layers_of_a_d_network_have_timms_numbers():
    params = shapes(build_model("resnet26d", "torchvision"))["params"]
    assert set(params["conv1"]) == {"0", "1", "3", "4", "6"}
    kernels = [params["conv1"][number]["kernel"].shape for number in "036"]
    assert kernels == [(3, 3, 1, 32), (3, 3, 32, 32), (3, 3, 32, 64)]
    for stage in ("layer1", "layer2"):  # though the first has nothing to pool
        assert set(params[stage]["0"]["downsample"]) == {"1", "2"}


@pytest.mark.parametrize(
    ("replaced", "sides", "dilations"),
    [
        ((), (16, 8, 4, 2), [1, 1, 1, 1, 1, 1, 1, 1]),
        ((False, False, False), (16, 8, 4, 2), [1, 1, 1, 1, 1, 1, 1, 1]),
        ((False, False, True), (16, 8, 4, 4), [1, 1, 1, 1, 1, 1, 1, 2]),
        ((False, True, True), (16, 8, 8, 8), [1, 1, 1, 1, 1, 2, 2, 4]),
        ((True, False, True), (16, 16, 8, 8), [1, 1, 1, 2, 2, 2, 2, 4]),
    ],
)
@pytest.mark.parametrize("size", [64, 61])
def test_dilation_in_the_place_of_stride_as_torchvision_has_it(replaced, sides, dilations, size):
    found = []

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, resnet_flax.nn.layers.Conv) and module.name == "conv2":
            found.append(module.dilation)
        return call(*args, **kwargs)

    model = ResNet((2,) * 4, Bottleneck, channels=4, replace_stride_with_dilation=replaced)
    images = jnp.zeros((1, size, size, 1))
    with nn.intercept_methods(record):
        maps, _ = jax.eval_shape(lambda: model.init_with_output(KEY, images, features=True))
    assert tuple(m.shape[1] for m in maps) == sides
    assert found == dilations
    assert sides[-1] == math.ceil(size / model.total_stride)


def test_one_channel_input_is_not_broadcast_into_the_shortcut():
    with pytest.raises(ValueError, match=r"\(4, 6, 6, 1\).*\(4, 6, 6, 3\).*use_1x1conv=True"):
        Residual(3).init(KEY, jnp.ones((4, 6, 6, 1)))


@pytest.mark.parametrize("first_block", [True, False])
@pytest.mark.parametrize(("block", "features"), [(Residual, 8), (Bottleneck, 32)])
def test_stage_shapes(block, features, first_block):
    stage = Stage(8, 2, first_block, block)
    out, _ = jax.eval_shape(stage.init_with_output, KEY, jnp.ones((1, 7, 7, 8)))
    side = 7 if first_block else 4
    assert out.shape == (1, side, side, features)


def test_feature_maps_and_pooled_features():
    model = ResNet((1, 1, 1, 1), num_classes=0, channels=8)
    images = jnp.ones((2, 64, 64, 1))
    variables = jax.jit(model.init)(KEY, images)
    assert "fc" not in variables["params"]
    maps, pooled = jax.jit(
        lambda variables: (
            model.apply(variables, images, features=True),
            model.apply(variables, images),
        )
    )(variables)
    assert [m.shape for m in maps] == [
        (2, 16, 16, 8),
        (2, 8, 8, 16),
        (2, 4, 4, 32),
        (2, 2, 2, 64),
    ]
    np.testing.assert_allclose(pooled, maps[-1].mean((1, 2)), rtol=1e-5, atol=1e-6)


def small(**fields) -> ResNet:
    return ResNet((1, 1), **{"stem": "cifar", "channels": 8, **fields})


def test_training_updates_statistics_and_evaluation_does_not():
    model, images = small(), jax.random.normal(KEY, (4, 8, 8, 1))
    variables = jax.jit(model.init)(KEY, images)

    @partial(jax.jit, static_argnums=0)
    def statistics(train):
        return model.apply(variables, images, train=train, mutable=["batch_stats"])[1]

    update, kept = statistics(True), statistics(False)
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), update["batch_stats"], variables["batch_stats"]
    )
    assert all(jax.tree.leaves(changed))
    chex.assert_trees_all_equal(kept["batch_stats"], variables["batch_stats"])


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    model, images = small(dtype=jnp.bfloat16), jnp.ones((2, 8, 8, 1))
    variables = jax.eval_shape(model.init, KEY, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32
    maps = jax.eval_shape(partial(model.apply, features=True), variables, images)
    assert maps[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("block", [Residual, Bottleneck])
def test_zero_init_makes_a_block_without_bias_the_identity(block, preactivation):
    conv = partial(resnet_flax.nn.layers.Conv, use_bias=False)
    channels = 2 if block is Residual else 8
    module = block(2, zero_init_residual=True, preactivation=preactivation, conv=conv)
    images = jax.random.uniform(KEY, (2, 4, 4, channels))
    out, _ = jax.jit(module.init_with_output)(KEY, images)
    np.testing.assert_array_equal(out, images)


def test_stochastic_depth_skips_whole_samples_and_only_in_training():
    block = Residual(1, stochastic_depth_rate=0.5)
    images = jax.random.uniform(KEY, (64, 4, 4, 1))
    variables = jax.jit(block.init)(KEY, images)
    whole = block.clone(stochastic_depth_rate=0.0)
    train = {"train": True, "mutable": ["batch_stats"]}
    branch_kept, _ = jax.jit(partial(whole.apply, **train))(variables, images)
    out, _ = jax.jit(partial(block.apply, **train))(variables, images, rngs={"dropout": KEY})
    skipped = [bool((o == i).all()) for o, i in zip(out, images, strict=True)]
    assert 16 < sum(skipped) < 48
    assert not any(bool((o == i).all()) for o, i in zip(branch_kept, images, strict=True))
    np.testing.assert_array_equal(
        jax.jit(block.apply)(variables, images), jax.jit(whole.apply)(variables, images)
    )


def test_stochastic_depth_rates_grow_linearly():
    rates = ResNet((2, 3), stochastic_depth_rate=0.4).block_rates()
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])


def test_dropout_needs_its_key_only_in_training():
    model, images = small(dropout_rate=0.5), jnp.ones((2, 8, 8, 1))
    variables = jax.jit(model.init)(KEY, images)
    train = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    first, second = (
        train(variables, images, rngs={"dropout": key})[0] for key in jax.random.split(KEY)
    )
    assert (first != second).any()
    np.testing.assert_array_equal(
        jax.jit(model.apply)(variables, images), jax.jit(small().apply)(variables, images)
    )


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"preactivation": True}, {"conv1", "norm", "layer1", "layer2", "fc"}),
        ({"stem": "imagenet"}, {"conv1", "bn1", "layer1", "layer2", "fc"}),
    ],
)
def test_variants_have_the_layers_they_should(fields, layers):
    assert set(shapes(small(**fields))["params"]) == layers


def test_unknown_names_are_told_with_the_choices():
    choices = "choose from resnet8, resnet14, resnet18"
    with pytest.raises(InputError, match=f"unknown model 'resnet19': {choices}"):
        build_model("resnet19")
    with pytest.raises(InputError, match="unknown flavour 'keras': choose from d2l, torchvision"):
        build_model("resnet18", "keras")
    with pytest.raises(ValueError, match="stem cannot be 'vgg'"):
        small(stem="vgg")
    with pytest.raises(ValueError, match=r"must have shape \(N, H, W, C\), not \(28, 28\)"):
        small().init(KEY, jnp.ones((28, 28)))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"stage_sizes": (0,)}, "stage_sizes"),
        ({"stage_sizes": (1,) * 7}, "stage_sizes"),
        ({"channels": 0}, "channels"),
        ({"channels": 8.0}, "channels"),
        ({"width_multiplier": float("nan")}, "width_multiplier"),
        ({"use_bias": 1}, "use_bias"),
        ({"dropout_rate": 1.5}, "dropout_rate"),
        ({"stem": "huge"}, "stem"),
        ({"groups": 0, "block": Bottleneck}, "groups"),
        ({"groups": True, "block": Bottleneck}, "groups"),
        ({"groups": 2}, "groups"),
        ({"width_per_group": 4.5, "block": Bottleneck}, "width_per_group"),
        ({"width_per_group": 128}, "width_per_group"),
        ({"average_shortcut": 1}, "average_shortcut"),
        *(
            ({"replace_stride_with_dilation": value, **fields}, "replace_stride_with_dilation")
            for fields, value in [
                ({"stage_sizes": (1, 1)}, (True,)),
                ({"stage_sizes": (1, 1), "block": Bottleneck}, (True, False)),
                ({"stage_sizes": (1, 1), "block": Bottleneck}, (1,)),
                ({"stage_sizes": (1, 1), "block": Bottleneck}, True),
                ({"block": Bottleneck}, (True,)),
            ]
        ),
    ],
)
def test_a_field_out_of_range_is_refused_where_the_network_is_made(fields, name):
    with pytest.raises(ValueError, match=f"^{name} cannot be "):
        ResNet(**{"stage_sizes": (1,), **fields})


@pytest.mark.parametrize("field", [{"groups": 2}, {"width_per_group": 4}, {"dilation": 2}])
def test_a_basic_block_has_neither_groups_nor_dilation(field):
    with pytest.raises(InputError, match=f"^{next(iter(field))} cannot be .* take a Bottleneck"):
        Residual(8, **field)


def test_lists_and_numpys_numbers_are_taken():
    model = ResNet([1, np.int64(1)], channels=np.int32(8), width_multiplier=np.float32(1))
    assert model.stage_sizes == (1, 1)
    assert hash(model) == hash(model.clone())


def test_a_network_tells_all_that_decides_its_function():
    changed = {
        "stage_sizes": (1, 2),
        "block": Bottleneck,
        "use_bias": False,
        "norm_shortcut": True,
        "stem": "small",
        "channels": 8,
        "width_multiplier": 2.0,
        "groups": 2,
        "width_per_group": 32,
        "replace_stride_with_dilation": (True,),
        "average_shortcut": True,
        "stride_first": True,
        "preactivation": True,
        "zero_init_residual": True,
        "dropout_rate": 0.1,
        "stochastic_depth_rate": 0.2,
        "momentum": 0.3,
        "epsilon": 1e-3,
        "dtype": "bfloat16",
    }
    model = ResNet(**changed, num_classes=7)
    description = json.loads(json.dumps(describe_model(model)))
    assert description.keys() == changed.keys()
    assert model_from_description(description, 7) == model
    # A new field is told without a second edit; these do not matter to a trained network.
    names = {field.name for field in dataclasses.fields(ResNet)} - {"parent", "name"}
    untold = {"num_classes", "conv_init", "dense_init", "frozen_stages", "param_dtype"}
    assert names == changed.keys() | untold | {"normalization_groups"}
    assert describe_model(model.clone(normalization_groups=4)) == describe_model(model)


def test_a_description_by_version_0_1_0_means_the_defaults():
    model = ResNet((1, 1), Bottleneck, dtype="float32")
    description = describe_model(model)
    later = ("groups", "width_per_group", "replace_stride_with_dilation", "average_shortcut")
    before = {name: value for name, value in description.items() if name not in later}
    assert model_from_description(before, 10) == model
    with pytest.raises(InputError, match="groups cannot be None"):
        model_from_description(before | {"groups": None}, 10)
    del before["channels"]
    with pytest.raises(InputError, match="channels cannot be None"):
        model_from_description(before, 10)


def test_the_parts_are_the_variables_and_the_stride_is_that_of_the_shapes():
    for fields in (
        {},
        {"preactivation": True},
        {"stem": "cifar"},
        {"num_classes": 0},
        {"stem": "deep", "average_shortcut": True},
        {"block": Bottleneck, "replace_stride_with_dilation": (False, True)},
    ):
        model = ResNet((1, 1, 1), channels=4, **fields)
        images = jax.ShapeDtypeStruct((1, 64, 64, 1), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        names = {name for part in model.parts.values() for name in part}
        assert names == variables["params"].keys()
        maps = jax.eval_shape(lambda v, x, m=model: m.apply(v, x, features=True), variables, images)
        assert maps[-1].shape[1] == 64 // model.total_stride
