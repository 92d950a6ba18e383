"""`python -m resnet_flax convert`: every format and layout, and one-line errors."""

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnet_flax import build_model
from resnet_flax.commands.convert import main
from resnet_flax.errors import InputError
from resnet_flax.weights import from_torch, load_safetensors, save_safetensors, to_torch
from tests.support.state_dicts import random_variables
from tests.support.torch_reference import TorchvisionResNet, d2l_resnet18, randomise_norms


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise_norms(d2l_resnet18())


@pytest.fixture
def checkpoint(net: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    return path


def run(*arguments: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["resnet-flax convert", *map(str, arguments)])
        main()


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict", "model"])
def test_there_and_back_is_bit_exact(net: Any, tmp_path: Path, wrap: str | None) -> None:
    net[0][1].num_batches_tracked.fill_(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked.fill_(235)
    paths = [tmp_path / name for name in ("in.pth", "middle.safetensors", "out.pth")]
    torch.save({wrap: net.state_dict(), "epoch": 3} if wrap else net.state_dict(), paths[0])
    run(paths[0], paths[1], "--model", "resnet18", "--to", "huggingface")
    assert "resnet.embedder.embedder.convolution.bias" in load_safetensors(paths[1])
    run(paths[1], paths[2], "--model", "resnet18", "--to", "d2l")
    back = torch.load(paths[2], weights_only=True)
    assert back.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        assert torch.equal(back[key], value)
        assert back[key].dtype == value.dtype
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_summary_and_the_flavour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = TorchvisionResNet((2, 2, 2, 2), 3, 1000)
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(net.state_dict(), source)
    run(source, target, "--model", "resnet18", "--to", "torchvision")
    assert capsys.readouterr().out == f"{target}: 122 tensors, torchvision's keys\n"
    model = build_model("resnet18", "torchvision", num_classes=1000)
    from_torch(model, load_safetensors(target))


@pytest.mark.parametrize("name", ["resnet8", "resnet14"])
def test_the_recipes_networks_convert(name: str, tmp_path: Path) -> None:
    model = build_model(name)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors = to_torch(model, random_variables(model))
    save_safetensors(source, tensors)
    run(source, target, "--model", name, "--to", "torchvision")
    found = load_safetensors(target)
    assert all(np.array_equal(found[key], value) for key, value in tensors.items())


def test_dtypes_are_kept_or_changed(net: Any, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "half.pth"
    run(checkpoint, target, "--model", "resnet18", "--to", "d2l", "--dtype", "bfloat16")
    half = torch.load(target, weights_only=True)
    assert torch.equal(half["7.weight"], net.state_dict()["7.weight"].bfloat16())
    again = tmp_path / "again.safetensors"
    run(target, again, "--model", "resnet18", "--to", "d2l")
    assert load_safetensors(again)["7.weight"].dtype.name == "bfloat16"

    double = tmp_path / "double.pth"
    torch.save({k: v.double() if v.is_floating_point() else v for k, v in half.items()}, double)
    run(double, again, "--model", "resnet18", "--to", "d2l")
    assert load_safetensors(again)["7.weight"].dtype == np.float64


def test_an_average_is_told_and_chosen(
    net: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "resnet_flax")
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    average = {key: value + 1 for key, value in net.state_dict().items()}
    torch.save({"state_dict": net.state_dict(), "state_dict_ema": average}, source)
    for part, tensors in (([], net.state_dict()), (["--part", "state_dict_ema"], average)):
        run(source, target, "--model", "resnet18", "--to", "d2l", *part)
        assert np.array_equal(load_safetensors(target)["7.bias"], tensors["7.bias"])
    assert f"read state_dict of {source}; `part` chooses state_dict_ema" in caplog.messages


def test_an_averaged_model_is_converted(
    net: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`torch.optim.swa_utils.AveragedModel`'s own state dict."""
    caplog.set_level("INFO", "resnet_flax")
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(torch.optim.swa_utils.AveragedModel(net).state_dict(), source)
    run(source, target, "--model", "resnet18", "--to", "d2l")
    assert load_safetensors(target).keys() == net.state_dict().keys()
    assert caplog.messages == ["left behind, being outside of module.: n_averaged"]


def test_counters_that_differ_are_reported(
    net: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "resnet_flax")
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    state_dict = net.state_dict() | {"0.1.num_batches_tracked": torch.tensor(300)}
    torch.save(state_dict, source)
    run(source, target, "--model", "resnet18", "--to", "d2l")
    assert caplog.messages[0].startswith("num_batches_tracked differed between layers ")
    assert caplog.messages[0].endswith(", 300]): wrote 300")
    assert load_safetensors(target)["1.0.bn1.num_batches_tracked"] == 300


class Payload:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    source, proof = tmp_path / "in.pth", tmp_path / "proof"
    torch.save({"7.weight": Payload(proof)}, source)
    with pytest.raises(InputError, match="not a file of tensors alone"):
        run(source, tmp_path / "out.safetensors", "--model", "resnet18", "--to", "d2l")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "is damaged"),
        (b"junk", "is damaged"),
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({"7.weight": torch.zeros(1)}, "do not fit: missing: "),
        ({"1.0.bn1.num_batches_tracked": torch.zeros(2)}, "do not fit: missing: "),
    ],
)
def test_bad_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    with pytest.raises(InputError, match=message) as error:
        run(source, tmp_path / "out.safetensors", "--model", "resnet18", "--to", "d2l")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_place_that_cannot_be_written_is_named(checkpoint: Path, name: str) -> None:
    target = checkpoint.parent / "no" / "folder" / name
    with pytest.raises(InputError, match=f"cannot write .*{name}"):
        run(checkpoint, target, "--model", "resnet18", "--to", "d2l")


def test_pytorch_is_asked_for_only_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(checkpoint, first, "--model", "resnet18", "--to", "d2l")
    imports = builtins.__import__

    def without_torch(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return imports(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    run(first, second, "--model", "resnet18", "--to", "torchvision")
    with pytest.raises(InputError, match="install torch, or use"):
        run(second, checkpoint, "--model", "resnet18", "--to", "d2l")


def test_as_a_program(checkpoint: Path, tmp_path: Path) -> None:
    def program(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "resnet_flax", "convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    target = tmp_path / "out.safetensors"
    done = program(checkpoint, target, "--model", "resnet18", "--to", "torchvision")
    assert (done.returncode, done.stderr) == (0, "")
    assert target.exists()
    failed = program(checkpoint, target, "--model", "resnet50", "--to", "torchvision")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        run(checkpoint, target, "--model", "resnet18", "--to", "timm")
