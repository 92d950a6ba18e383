"""The README's commands and snippets are run, in its order."""

import re

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.snippets import ROOT, run_page
from tests.support.torch_reference import TorchvisionResNet

README = (ROOT / "README.md").read_text()


def test_the_snippets_take_a_checkpoint_from_pytorch_and_back(
    torchvision_checkpoint, capsys, fashion_mnist
):
    namespace = run_page(ROOT / "README.md")
    assert re.search(r"loss \d\.\d{3}, accuracy 0\.\d{3}\n", capsys.readouterr().out)

    tuned = TorchvisionResNet((2, 2, 2, 2), 1, 10, "imagenet")
    tuned.load_state_dict(load_file("tuned.safetensors"))
    assert tuned.bn1.num_batches_tracked == 2
    images = np.random.default_rng(0).random((4, 32, 32, 1), np.float32)
    ours = jax.jit(namespace["model"].apply)(namespace["state"].variables, images)
    theirs = tuned.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).detach()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "command",
    ["pip install -e . && python train.py --epochs 10", 'pip install -e ".[test]" && pytest'],
)
def test_the_two_commands_stand_at_the_top(command):
    assert README.index(f"```bash\n{command}\n```") < 1000


def test_what_the_readme_names_exists():
    for module in re.findall(r"python -m ((?:resnet_flax|benchmarks)\.\w+)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists(), picture
    listed = set(re.findall(r"^\| `(\w+)/` \|", README, re.M))
    folders = {path.parent.name for path in (ROOT / "resnet_flax").glob("*/__init__.py")}
    assert folders == listed
    for module in re.findall(r"\(`(\w+)`\)", README):
        assert list((ROOT / "resnet_flax").glob(f"*/{module}.py")), module
