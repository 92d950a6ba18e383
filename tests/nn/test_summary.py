import pytest

from resnet_flax.nn.resnet import build_model, resnet18, resnet50
from resnet_flax.nn.summary import Row, summarize

D2L_TABLE = [  # D2L's shapes; multiply-adds by hand: H * W * C' * k * k * C over the convolutions
    Row("stem", (56, 56, 64), 64 * 50 + 128, 112 * 112 * 64 * 49),
    Row("stage 1", (56, 56, 64), 4 * (64 * 577 + 128), 4 * 56 * 56 * 64 * 576),
    Row("stage 2", (28, 28, 128), 525_952, 28 * 28 * 128 * (576 + 3 * 1152 + 64)),
    Row("stage 3", (14, 14, 256), 2_100_480, 14 * 14 * 256 * (1152 + 3 * 2304 + 128)),
    Row("stage 4", (7, 7, 512), 8_395_264, 7 * 7 * 512 * (2304 + 3 * 4608 + 256)),
    Row("global average pool", (512,), 0, 0),
    Row("dense", (10,), 5_130, 5_120),
]


def test_d2ls_table_at_224():
    rows = summarize(resnet18(), 224)
    assert rows == D2L_TABLE
    assert sum(row.parameters for row in rows) == 11_178_378


@pytest.mark.parametrize(
    ("name", "billions"), [("resnext50_32x4d", 4.230), ("wide_resnet50_2", 11.398)]
)
def test_multiply_adds_are_those_that_torchvision_publishes(name, billions):
    model = build_model(name, "torchvision", num_classes=1000)
    total = sum(row.multiply_adds for row in summarize(model, 224, 3))
    assert round(total / 1e9, 3) == billions


@pytest.mark.parametrize(
    "fields",
    [
        {"preactivation": True},
        {"num_classes": 0},
        {"stem": "cifar"},
        {"stem": "deep", "average_shortcut": True},
    ],
)
def test_every_parameter_is_in_a_row(fields):
    import jax
    import jax.numpy as jnp

    model = resnet50(**fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    expected = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(row.parameters for row in summarize(model, 32, 3)) == expected
