"""A network by its name: everywhere a folder may stand, from the hub on loopback."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from resnet_flax import TrainConfig, from_pretrained, train
from resnet_flax.__main__ import main
from resnet_flax.errors import InputError
from resnet_flax.inference import predict, read_images, read_pretrained
from tests.support.image_files import write_classes
from tests.support.torch_reference import TorchvisionResNet, randomise_norms

NAME = "someone/tiny-resnet"
CONFIG = {
    "model_type": "resnet",
    "depths": [1, 1],
    "hidden_sizes": [8, 16],
    "embedding_size": 8,
    "layer_type": "basic",
    "id2label": {"0": "cat", "1": "dog", "2": "mouse"},
}
PROCESSOR = {"size": {"shortest_edge": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3}


@pytest.fixture
def net(tmp_path, hub, monkeypatch) -> TorchvisionResNet:
    """What the hub serves by that name; the current folder is empty."""
    torch.manual_seed(0)
    net = randomise_norms(TorchvisionResNet((1, 1), 3, 3, channels=8)).eval()
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    save_file(net.state_dict(), folder / "model.safetensors")
    hub.serve(NAME, folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_classes(Path("pets"), ("cats", "dogs"), count=8, size=(40, 33))
    return net


def test_its_logits_are_pytorchs(net):
    model, variables = from_pretrained(NAME)
    network, _ = read_pretrained(f"{NAME}@main")
    images = read_images(network, sorted(Path("pets").rglob("*.png")))
    assert images.shape == (16, 32, 32, 3)
    ours = jax.jit(model.apply)(variables, images)
    theirs = net(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    files = ["pets/cats/00.png"]
    shares = np.exp(theirs[0]) / np.exp(theirs[0]).sum()
    assert dict(predict(NAME, files)[0].top) == pytest.approx(
        dict(zip(network.classes, shares, strict=True)), rel=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", NAME, "pets/cats/00.png"], "pets/cats/00.png  "),
        (["summary", NAME], "stage 2"),
        (["export", NAME, "--to", "stablehlo"], "model.stablehlo: from images (N, 32, 32, 3) to 3"),
    ],
)
def test_the_programs_take_it(net, arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["resnet_flax", *arguments])
    assert main() in (0, None), capsys.readouterr().err
    assert said in capsys.readouterr().out


def test_its_accuracy_is_that_of_pytorch(net, monkeypatch, capsys):
    Path("own").mkdir()
    for name in ("cat", "dog", "mouse"):
        write_classes(Path("own") / "test", (name,), count=5, size=(33, 50))
    Path("own/train").symlink_to("test")
    monkeypatch.setattr("sys.argv", ["resnet_flax", "evaluate", NAME, "--dataset", "folder:own"])
    main()
    table = capsys.readouterr().out
    network, _ = read_pretrained(NAME)
    files = sorted(Path("own/test").rglob("*.png"))
    images = np.array(read_images(network, files)).transpose(0, 3, 1, 2)
    answers = net(torch.from_numpy(images)).argmax(1).numpy()
    right = sum(
        network.classes[n] == path.parent.name for n, path in zip(answers, files, strict=True)
    )
    assert f"accuracy {right / 15:.4f}" in table


def test_training_starts_from_it_and_says_so(net, caplog):
    caplog.set_level(logging.INFO, "resnet_flax")
    config = TrainConfig(init=NAME, freeze_stages=2, dataset="folder:pets", epochs=1, batch_size=4)
    assert config.recipe == "finetune"
    run = train(config)
    assert "images are normalised by mean 0.5, 0.4, 0.3 and standard deviation 0.2" in caplog.text
    assert f"start from {NAME}" in caplog.text
    network, variables = read_pretrained(run.folder)
    before, _ = read_pretrained(NAME)
    assert (network.resizing, network.normalization) == (before.resizing, before.normalization)
    assert network.image_size == 32
    assert network.classes == ("cats", "dogs")
    frozen = from_pretrained(NAME)[1]["params"]["layer1"]
    assert all(map(np.array_equal, *map(jax.tree.leaves, (frozen, variables["params"]["layer1"]))))
    saved = json.loads((run.folder / "config.json").read_text())
    assert (saved["init"], saved["image_size"], saved["model"]) == (NAME, 32, None)
    card = (run.folder / "README.md").read_text()
    assert f"fine-tuned from {NAME} on" in card
    assert "normalised by mean (0.5, 0.4, 0.3) and standard deviation (0.2, 0.2, 0.2)" in card
    again = train(TrainConfig(run_dir=run.folder, resume=True))
    assert again.results == run.results


def test_what_a_frozen_trunk_sees_is_what_it_was_trained_on(net):
    """Features of a folder's test images, through training's own road, are PyTorch's."""
    from resnet_flax.nn.preprocessing import prepare_images
    from resnet_flax.runs.train import choose_normalization, load_data, resizing_for

    network, variables = read_pretrained(NAME)
    config = TrainConfig(init=NAME, dataset="folder:pets", image_size=32)
    data = load_data(config, resizing_for(32, network))
    normalization = choose_normalization(config, network, 3)
    images = prepare_images(data.test.images, 32, normalization)
    trunk = network.model.clone(num_classes=0)
    ours = jax.jit(trunk.apply)(variables, images)
    net.fc = torch.nn.Identity()
    expected = np.array(read_images(network, sorted(Path("pets").rglob("*.png"))))
    theirs = net(torch.from_numpy(expected).permute(0, 3, 1, 2)).detach().numpy()
    for row in np.asarray(ours):
        assert np.abs(theirs - row).max(1).min() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("flag", "normalization"),
    [("none", None), ("imagenet", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))],
)
def test_another_normalisation_is_taken_when_asked_for(net, flag, normalization):
    from resnet_flax.runs.train import choose_normalization

    network, _ = read_pretrained(NAME)
    config = TrainConfig(init=NAME, normalization=flag)
    assert choose_normalization(config, network, 3) == normalization


def test_a_missing_name_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="someone/nothing is neither a folder here nor a repos"):
        from_pretrained("someone/nothing")
    config = TrainConfig(init="someone/nothing", dataset="folder:pets")
    with pytest.raises(InputError, match="someone/nothing is neither a folder here nor"):
        train(config)
    assert not (tmp_path / "runs").exists()
