"""Networks handed back: folders in timm's form, read by us, timm and transformers, and pushed."""

import dataclasses
import json
import logging
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from resnet_flax import ARCHITECTURES, build_model
from resnet_flax.data import Resizing
from resnet_flax.errors import InputError
from resnet_flax.inference import (
    Network,
    export,
    from_pretrained,
    hand_back,
    push,
    read_images,
    read_pretrained,
)
from resnet_flax.inference.hand_back import FILES, crop_share, timm_config, timm_name, unsaid
from resnet_flax.inference.pretrained import read_network
from resnet_flax.nn.preprocessing import IMAGENET_NORMALIZATION, Normalization
from tests.support.finished_run import new_network, new_variables, write_pretrained
from tests.support.hub_server import READER, WRITER

NAMES = ("cat", "dog", "a long, odd näme")
TIMMS = [name for name in ARCHITECTURES if build_model(name).stem != "small"]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A network as if timm had it: its smallest would be 45 MB a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", {"stage_sizes": (1, 1), "channels": 4})
        yield


def timms_network(name: str = "tiny", channels: int = 3, size: int = 32, **more: Any) -> Network:
    """A network that timm has too, as fine-tuning leaves it."""
    fields: dict[str, Any] = {
        "classes": NAMES,
        "image_shape": (size, size, channels),
        "image_size": size,
        "dark_background": False,
        "dataset": "folder:pets",
        "fit": "crop",
        "resizing": Resizing(size + 5, interpolation="bicubic"),
        "normalization": IMAGENET_NORMALIZATION if channels == 3 else Normalization((0.5,), (0.2,)),
    }
    model = build_model(name, "torchvision", num_classes=len(NAMES))
    return new_network(model, **fields | more)


@pytest.fixture(scope="module")
def handed(tiny, tmp_path_factory):
    """A folder, and the network and variables that were written there."""
    network = timms_network()
    variables = new_variables(network)
    folder = tmp_path_factory.mktemp("handed") / "network"
    hand_back(network, variables, folder)
    return folder, network, variables


@pytest.fixture
def photos(tmp_path):
    """Grey pictures, so that one channel is three: upright, lying and square."""
    random = np.random.default_rng(0)
    paths = []
    for number, shape in enumerate([(50, 41), (37, 90), (64, 64)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(paths[-1])
    return paths


def test_our_own_reader_gives_the_same_network(handed):
    folder, network, variables = handed
    assert {path.name for path in folder.iterdir()} == {*FILES}
    found, read = read_pretrained(folder)
    chex.assert_trees_all_equal(read, variables)
    expected = network.as_json() | {"dataset": "unknown"}
    assert found.as_json() == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 1},
        {"channels": 1, "normalization": None},
        {"normalization": None},
        {"channels": 4, "normalization": None},
        {"resizing": Resizing(32, squash=True, interpolation="lanczos")},
        {"resizing": Resizing(47, squash=True)},
        {"resizing": None, "image_shape": (32, 32, 3)},
    ],
)
def test_preprocessing_comes_back(changes, tmp_path):
    network = timms_network(**changes)
    (tmp_path / "config.json").write_text(json.dumps(timm_config(network)))
    found = read_network(tmp_path)
    assert found.image_shape == network.image_shape
    assert found.resizing == (network.resizing or Resizing(32))
    channels = network.image_shape[-1]
    nothing = Normalization((0.0,) * channels, (1.0,) * channels)
    assert found.normalization == (network.normalization or nothing)
    assert found.model.num_classes == len(NAMES)


def test_a_picture_becomes_the_same_pixels(handed, photos):
    folder, network, _ = handed
    np.testing.assert_array_equal(
        read_images(read_pretrained(folder)[0], photos), read_images(network, photos)
    )


def test_the_share_that_is_cropped_gives_the_side_back():
    for size in (1, 28, 32, 96, 160, 176, 224, 288, 299, 384, 1023, 1024):
        for side in range(size, 2049):
            assert math.floor(size / crop_share(size, side)) == side
    assert crop_share(224, 256) == 0.875
    assert any(math.floor(224 / (224 / side)) != side for side in range(224, 2049))


@pytest.mark.parametrize("name", TIMMS)
def test_every_architecture_keeps_its_name(name):
    model = build_model(
        name, "torchvision", num_classes=7, dropout_rate=0.1, zero_init_residual=True, momentum=0.2
    )
    assert timm_name(model) == name


@pytest.mark.parametrize(
    ("name", "flavour", "fields", "why"),
    [
        ("resnet50", "d2l", {}, "resnet50 of D2L's flavour has biased convolutions"),
        ("resnet14", "torchvision", {}, "resnet14 has the small stem"),
        ("resnet18", "torchvision", {"stem": "cifar"}, "stem 'cifar'"),
        ("resnet18", "torchvision", {"channels": 8}, r"stage_sizes \[2, 2, 2, 2\], channels 8"),
        ("resnet50", "torchvision", {"stride_first": True}, "stride_first True"),
        ("resnet50", "torchvision", {"epsilon": 1e-3}, "epsilon 0.001"),
        (
            "resnet50",
            "torchvision",
            {"replace_stride_with_dilation": (False, True, True)},
            r"replace_stride_with_dilation \[False, True, True\]",
        ),
    ],
)
def test_what_timm_has_not_is_refused_by_name(name, flavour, fields, why, tmp_path):
    network = new_network(build_model(name, flavour, **fields))
    with pytest.raises(InputError, match=f"no such network: .*{why}") as error:
        hand_back(network, {}, tmp_path / "folder")
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_said_is_logged_and_in_the_card(tmp_path, caplog):
    network = timms_network(
        channels=1, flip=True, fit="pad", dark_background=True, resizing=None, size=28
    )
    with caplog.at_level(logging.INFO, "resnet_flax"):
        hand_back(network, new_variables(network), tmp_path / "folder")
    lines = unsaid(network)
    assert caplog.messages == [f"timm's form cannot say: {line}" for line in lines]
    card = (tmp_path / "folder" / "README.md").read_text()
    assert all(f"- {line}\n" in card for line in lines)
    for word in ("mirror", "padded", "bright grounds", "grey"):
        assert any(word in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"resizing": None}, "no square are cropped"),
        ({"resizing": Resizing(37, rounds_down=True)}, "rounded down"),
        ({"image_size": 24}, "become 32x32 before 24x24"),
        ({"model": build_model("resnet18", "torchvision", dtype="bfloat16")}, "in bfloat16"),
    ],
)
def test_what_else_cannot_be_said(changes, word):
    (line,) = unsaid(dataclasses.replace(timms_network(), **changes))
    assert word in line
    assert unsaid(timms_network()) == []


def test_a_folder_is_replaced_if_it_holds_nothing_else(handed, tmp_path):
    source, network, variables = handed
    folder = shutil.copytree(source, tmp_path / "network")
    (folder / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    hand_back(network, variables, tmp_path / "link")  # replaced, not followed
    assert not (tmp_path / "link").is_symlink()
    assert (folder / "config.json").read_text() == "{}"
    hand_back(network, variables, folder)
    from_pretrained(folder)
    (folder / "precious").write_text("precious")
    with pytest.raises(InputError, match=r"holds other things .'precious'.: name a new folder"):
        hand_back(network, variables, folder)
    assert {path.name for path in tmp_path.iterdir()} == {"network", "link"}


def test_nothing_is_left_where_it_cannot_be_written(handed, tmp_path, monkeypatch):
    source, network, variables = handed
    with pytest.raises(InputError, match="absent/network: No such file or directory"):
        hand_back(network, variables, tmp_path / "absent" / "network")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="file: it is no new folder"):
        hand_back(network, variables, tmp_path / "file")
    folder = shutil.copytree(source, tmp_path / "network")
    before = (folder / "config.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    module = sys.modules["resnet_flax.inference.hand_back"]  # the name is the function's, too
    monkeypatch.setattr(module, "save_weights", full)
    with pytest.raises(InputError, match=r"cannot write .*network: No space left on device"):
        hand_back(network, variables, folder)
    assert (folder / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"file", "network"}


def test_an_old_folder_stays_when_the_new_one_cannot_take_its_place(handed, tmp_path, monkeypatch):
    source, network, variables = handed
    folder = shutil.copytree(source, tmp_path / "network")
    rename = Path.rename

    def once(path: Path, target: Path) -> Path:
        if target == folder and not path.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(InputError, match="Input/output error"):
        hand_back(network, variables, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["network"]
    from_pretrained(folder)


def test_export_does_not_write_over_what_it_reads(tmp_path):
    folder = tmp_path / "network"
    folder.mkdir()
    write_pretrained(folder, timms_network())
    with pytest.raises(InputError, match="the network is read from it"):
        export(folder, "huggingface", folder)
    path, _ = export(folder, "huggingface")
    assert path == folder / "huggingface"
    chex.assert_trees_all_equal(from_pretrained(path), from_pretrained(folder))


def pushed(hub, name: str) -> Path:
    repository = hub._repositories[name]
    return repository.commits[repository.revisions["main"]]


def test_push_and_load_by_name(handed, hub, tmp_path, monkeypatch):
    source, _, variables = handed
    monkeypatch.setenv("HF_TOKEN", WRITER)
    folder = shutil.copytree(source, tmp_path / "network")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    (folder / "notes.txt").write_text("private")
    assert push(folder, "me/mine", private=True) == f"{hub.endpoint}/me/mine"
    assert hub._repositories["me/mine"].private
    assert {path.name for path in pushed(hub, "me/mine").iterdir()} == {*FILES}
    assert (pushed(hub, "me/mine") / "README.md").read_text().endswith("Mine.")  # as it was
    chex.assert_trees_all_equal(read_pretrained("me/mine")[1], variables)
    # A network of ours, and by name: written first.
    native = tmp_path / "native"
    native.mkdir()
    write_pretrained(native, timms_network())
    push(native, "me/mine")
    assert "library_name: timm" in (pushed(hub, "me/mine") / "README.md").read_text()
    push("me/mine", "me/copy")
    assert not hub._repositories["me/copy"].private
    assert read_pretrained("me/copy")[0].classes == NAMES


def test_what_keeps_a_push_from_the_hub_is_one_line(handed, hub, tmp_path, monkeypatch):
    source, *_ = handed

    def refused(folder: Path, name: str = "me/mine") -> str:
        with pytest.raises(InputError) as error:
            push(folder, name)
        assert str(error.value).isprintable()
        return str(error.value)

    assert "it needs a token that may write there, by `hf auth login`" in refused(source)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "it needs a token that may write there" in refused(source)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert f"cannot upload to 'a b/c' at {hub.endpoint}: Repo id must" in refused(source, "a b/c")
    hub.status = 500
    assert f"cannot upload to 'me/mine' at {hub.endpoint}: " in refused(source)
    hub.stop()
    assert f"cannot upload to 'me/mine' at {hub.endpoint}: " in refused(source)
    d2l = tmp_path / "d2l"
    d2l.mkdir()
    write_pretrained(d2l, new_network())
    assert "timm and transformers have no such network" in refused(d2l)
    folder = shutil.copytree(source, tmp_path / "network")
    (folder / "README.md").unlink()
    os.link(source / "README.md", tmp_path / "secret")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    assert "is a link out of the folder" in refused(folder)


@pytest.mark.foreign
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet18", {"size": 64}),
        ("resnet26d", {"size": 64, "channels": 1}),
        ("resnext50_32x4d", {"size": 64, "resizing": Resizing(70, squash=True)}),
        ("resnet34", {"size": 64, "normalization": None, "resizing": Resizing(64)}),
    ],
)
def test_timm_and_transformers_give_the_same_logits(name, changes, tmp_path, photos, hub):
    """From pictures to logits, through each library's own preprocessing; by folder and by name."""
    import torch

    from tests.support.foreign import import_timm

    timm = import_timm()
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    network = timms_network(name, **changes)
    variables = new_variables(network)
    folder = tmp_path / "network"
    hand_back(network, variables, folder)
    hub.serve("me/mine", folder)
    expected = jax.jit(network.model.apply)(variables, read_images(network, photos))
    tolerance = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}
    mode = "L" if network.image_shape[-1] == 1 else "RGB"
    images = [Image.open(path).convert(mode) for path in photos]

    for place in (f"local-dir:{folder}", "hf-hub:me/mine"):
        model = timm.create_model(place, pretrained=True).eval()
        data = timm.data.resolve_model_data_config(model)
        transform = timm.data.create_transform(**data)
        with torch.no_grad():
            found = model(torch.stack([transform(image) for image in images]))
        np.testing.assert_allclose(found, expected, **tolerance)
        assert model.pretrained_cfg["label_names"] == list(NAMES)
    for place in (str(folder), "me/mine"):
        processor = AutoImageProcessor.from_pretrained(place)
        model = AutoModelForImageClassification.from_pretrained(place).eval()
        with torch.no_grad():
            found = model(processor.val_transforms(images[0])[None]).logits
        np.testing.assert_allclose(found, expected[:1], **tolerance)
        assert list(model.config.id2label.values()) == list(NAMES)


@pytest.mark.foreign
def test_timm_has_all_names():
    from tests.support.foreign import import_timm

    assert {*TIMMS} <= {*import_timm().list_models()}
