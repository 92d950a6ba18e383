import pytest

from resnet_flax.nn.resnet import resnet18, resnet50
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


@pytest.mark.parametrize("fields", [{"preactivation": True}, {"num_classes": 0}, {"stem": "cifar"}])
def test_every_parameter_is_in_a_row(fields):
    import jax
    import jax.numpy as jnp

    model = resnet50(**fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    expected = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(row.parameters for row in summarize(model, 32, 3)) == expected
