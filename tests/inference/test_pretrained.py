"""Networks from folders: rebuilt to the bit, and nothing else whatever the folder holds."""

import contextlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from resnet_flax import ARCHITECTURES, FLAVOURS, build_model
from resnet_flax.errors import InputError
from resnet_flax.inference.pretrained import Network, from_pretrained, read_pretrained
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.run_folder import open_run
from resnet_flax.training.recipes import RECIPES
from tests.support.finished_run import MODEL, new_network, write_pretrained

MODELS = {
    **{f"recipe {name}": build_model(r.model, r.flavour) for name, r in RECIPES.items()},
    **{
        f"{name} {flavour}": build_model(name, flavour)
        for name in ARCHITECTURES
        for flavour in FLAVOURS
    },
    "all fields": build_model(
        "resnet50",
        stem="cifar",
        channels=32,
        width_multiplier=2,
        groups=4,
        width_per_group=32,
        replace_stride_with_dilation=(False, True, True),
        average_shortcut=True,
        stride_first=True,
        preactivation=True,
        zero_init_residual=True,
        dropout_rate=0.1,
        stochastic_depth_rate=0.2,
        momentum=0.05,
        epsilon=1e-3,
        dtype="bfloat16",
    ),
}
INITIALISERS = {"conv_init", "dense_init"}  # of no use to a trained network


@pytest.fixture
def run(shared_run, tmp_path):
    """A copy to damage."""
    return shutil.copytree(shared_run.folder, tmp_path / "run")


@pytest.mark.parametrize("name", MODELS)
def test_the_description_rebuilds_the_network(name):
    network = new_network(MODELS[name], image_size=96, flip=True, dark_background=False, fit="crop")
    rebuilt = Network.from_json(json.loads(json.dumps(network.as_json())))
    for field, value in vars(network.model).items():
        if field not in INITIALISERS and not field.startswith("_"):
            found = getattr(rebuilt.model, field)
            assert (jnp.dtype(found) == jnp.dtype(value)) if "dtype" in field else found == value
    for field in ("classes", "image_shape", "image_size", "flip", "dark_background", "fit"):
        assert getattr(rebuilt, field) == getattr(network, field)


def test_one_line_gives_the_network_that_was_trained(shared_run):
    folder, network, variables, data = shared_run
    model, read = from_pretrained(folder)
    chex.assert_trees_all_equal(read, variables)
    images = data.images[:5] / np.float32(255)
    expected = jax.jit(network.model.apply)(variables, images)
    np.testing.assert_array_equal(jax.jit(model.apply)(read, images), expected)
    assert read_pretrained(str(folder))[0].classes == network.classes


def test_two_files_are_enough(shared_run, tmp_path):
    folder, _, variables, _ = shared_run
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    chex.assert_trees_all_equal(from_pretrained(tmp_path)[1], variables)


def test_float16_files_and_bfloat16_networks(tmp_path):
    write_pretrained(tmp_path, new_network(MODEL.clone(dtype="bfloat16")))
    model, _ = from_pretrained(tmp_path)
    assert model.dtype == "bfloat16"
    weights = load_file(tmp_path / "model.safetensors")
    halved = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in weights.items()}
    save_file(halved, tmp_path / "model.safetensors")
    _, variables = from_pretrained(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}


def test_a_run_of_version_0_1_0_has_fewer_fields(shared_run, run):
    content = json.loads((run / "config.json").read_text())
    for name in ("groups", "width_per_group", "replace_stride_with_dilation", "average_shortcut"):
        del content["network"][name]
    (run / "config.json").write_text(json.dumps(content))
    model, variables = from_pretrained(run)
    assert model.groups == 1
    chex.assert_trees_all_equal(variables, shared_run.variables)


def test_a_finished_run_can_be_resumed_and_stays_readable(run):
    before = json.loads((run / "config.json").read_text())
    flags = {"run_dir": run, "image_size": 28, "learning_rate": 0.1, "test_examples": 60}
    config = TrainConfig(**flags, epochs=12, resume=True)
    open_run(config, network=before["network"])
    after = json.loads((run / "config.json").read_text())
    assert after["network"] == before["network"]
    assert (before["epochs"], after["epochs"]) == (10, 12)
    from_pretrained(run)
    other = TrainConfig(**flags, seed=1, resume=True)
    with pytest.raises(InputError, match="whose run differs: `seed` 0 there, 1 here"):
        open_run(other, network=before["network"])


def refused(folder: Path) -> str:
    """The one line with which a folder is refused; nothing in it, or beside it, changes."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(InputError) as error:
        from_pretrained(folder)
    assert sorted(folder.parent.rglob("*")) == before
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 1500
    return line


def test_what_is_missing_is_named(run):
    assert "absent holds no trained network" in refused(run.parent / "absent")
    assert "cannot read config.json" in refused(run / "config.json")
    (run / "model.safetensors").unlink()
    assert "cannot read model.safetensors (No such file" in refused(run)


def test_a_run_from_before_this_version(run):
    content = json.loads((run / "config.json").read_text())
    del content["network"]
    (run / "config.json").write_text(json.dumps(content))
    assert 'config.json describes no network: it has no table "network"' in refused(run)


def test_pipes_and_folders_are_no_files(run):
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    assert "config.json is not a file" in refused(run)
    (run / "config.json").unlink()
    (run / "config.json").mkdir()
    assert "config.json is not a file" in refused(run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_lead_nowhere_else(run, name):
    outside = run.parent / name
    (run / name).rename(outside)
    (run / name).symlink_to(outside)
    assert "is a link out of the folder" in refused(run)
    (run / name).unlink()
    (run / name).symlink_to(name)  # to itself
    assert "holds no trained network" in refused(run)
    (run / name).unlink()
    (run / "inside").mkdir()
    outside.rename(run / "inside" / name)
    (run / name).symlink_to(Path("inside") / name)
    from_pretrained(run)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"network": 3}', b" " * 2_000_000],
)
def test_configurations_that_are_none(run, content):
    (run / "config.json").write_bytes(content)
    assert "config.json describes no network" in refused(run)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block", "os.system"),
        ("block", ["Residual"]),
        ("stem", "huge"),
        ("dtype", "float8"),
        ("stage_sizes", []),
        ("stage_sizes", [10**9]),
        ("stage_sizes", [100, 101]),
        ("stage_sizes", [1] * 7),
        ("stage_sizes", [True]),
        ("stage_sizes", "22"),
        ("channels", 10**9),
        ("channels", 8.0),
        ("channels", True),
        ("width_multiplier", float("nan")),
        ("groups", 2),
        ("groups", 10**9),
        ("width_per_group", 4),
        ("replace_stride_with_dilation", None),
        ("replace_stride_with_dilation", [True]),
        ("replace_stride_with_dilation", [0]),
        ("average_shortcut", 0),
        ("epsilon", -1),
        ("use_bias", 1),
        ("classes", ["a"] * 100_001),
        ("classes", []),
        ("classes", ["\x1b[2J"]),
        ("classes", ["two\nlines"]),
        ("classes", ["a" * 301]),
        ("classes", [1, 2]),
        ("image_shape", [28, 28]),
        ("image_shape", [28, 28, 0]),
        ("image_shape", [28, 10**6, 1]),
        ("image_size", 10**6),
        ("image_size", None),
    ],
)
def test_values_out_of_range_are_named(run, name, value):
    content = json.loads((run / "config.json").read_text())
    content["network"][name] = value
    (run / "config.json").write_text(json.dumps(content))
    assert f"{name} cannot be " in refused(run)


def test_a_network_that_cannot_be_built(run):
    content = json.loads((run / "config.json").read_text())
    content["network"] |= {"channels": 1, "width_multiplier": 0.01}
    (run / "config.json").write_text(json.dumps(content))
    assert "describes no network that can be built" in refused(run)


def test_no_memory_is_taken_for_what_a_file_only_claims(run):
    content = json.loads((run / "config.json").read_text())
    content["network"] |= {"channels": 4096, "stage_sizes": [2] * 6}  # 3 TB of weights
    (run / "config.json").write_text(json.dumps(content))
    tracemalloc.start()
    try:
        assert "the state dict and the model do not fit" in refused(run)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_a_file_of_weights_that_is_too_large_is_not_read(run):
    with (run / "model.safetensors").open("r+b") as file:
        file.truncate(10**12)  # sparse: it takes no space
    assert "model.safetensors has 1,000,000,000,000 bytes; the network of" in refused(run)


def test_weights_of_another_network(run, tmp_path):
    write_pretrained(tmp_path, new_network(MODEL.clone(channels=16)))
    shutil.copy(tmp_path / "model.safetensors", run)
    assert f"{run}: the state dict and the model do not fit" in refused(run)


def test_how_pictures_are_fitted_is_known_or_what_version_0_1_0_did():
    content = new_network(fit="crop").as_json()
    assert Network.from_json(content).fit == "crop"
    assert Network.from_json({k: v for k, v in content.items() if k != "fit"}).fit == "pad"
    with pytest.raises(ValueError, match="fit cannot be 'stretch'"):
        Network.from_json(content | {"fit": "stretch"})


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=3,
)
MANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **MANY)
@given(choice=st.data())
def test_no_configuration_makes_a_traceback(choice):
    content: dict[str, Any] = new_network().as_json()
    names = choice.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3))
    content |= {name: choice.draw(VALUES) for name in names}
    try:
        network = Network.from_json(content)
    except ValueError:
        return
    assert network.as_json().keys() == content.keys()


@settings(max_examples=50, **MANY)
@given(choice=st.data())
def test_damaged_weights_end_in_one_line_or_load(choice, shared_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(shared_run.folder / name, folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(choice.draw(st.integers(1, 4))):
        place = choice.draw(st.one_of(st.integers(0, 7), st.integers(8, header)))
        content[place] = choice.draw(st.integers(0, 255))
    path.write_bytes(content[: choice.draw(st.sampled_from([None, header, len(content) // 2]))])
    with contextlib.suppress(InputError):
        from_pretrained(folder)
    shutil.rmtree(folder)
