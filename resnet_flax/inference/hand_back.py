"""A trained network for PyTorch's users: a folder in timm's form, on disk or on the hub.

timm loads it, by ``timm.create_model("local-dir:FOLDER", pretrained=True)``, and so does
transformers, which knows timm's folders, and this package.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_flax.data import Resizing
from resnet_flax.errors import InputError
from resnet_flax.inference.hub import is_name, upload
from resnet_flax.inference.pretrained import CONFIG, WEIGHTS, Network, read_pretrained, save_weights
from resnet_flax.machine.files import inside, whole_folder
from resnet_flax.nn.blocks import Bottleneck
from resnet_flax.nn.preprocessing import Normalization
from resnet_flax.nn.resnet import ARCHITECTURES, ResNet, architecture, build_model, describe_model

logger = logging.getLogger(__name__)

CARD = "README.md"
FILES = (CONFIG, WEIGHTS, CARD)
CARD_TEXT = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, transformers, resnet_flax]
---

# {architecture}, {count} classes

Written by resnet_flax, in timm's form; the weights have torchvision's names. FOLDER is where this
file is, or `hf-hub:OWNER/NAME` stands for `local-dir:FOLDER` and `OWNER/NAME` for `FOLDER`.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])  # of a Pillow image
```

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModelForImageClassification.from_pretrained("FOLDER")
logits = model(**processor(image, return_tensors="pt")).logits
```

```python
from resnet_flax.inference import read_images, read_pretrained

network, variables = read_pretrained("FOLDER")
logits = network.model.apply(variables, read_images(network, ["photo.jpg"]))
```
"""
DIFFERS = """
These files cannot say all ("here" is resnet_flax, "there" are timm and transformers):

"""


def hand_back(
    network: Network, variables: Mapping[str, Any], folder: str | os.PathLike[str]
) -> None:
    """Writes a network's folder in timm's form, whole or not at all.

    It has ``config.json``, ``model.safetensors`` and a ``README.md``; an older folder of these
    files alone is replaced. What the form cannot say is logged, and is in the card.

    Raises:
        InputError: when timm has no such network, or the folder cannot be written.
    """
    config = timm_config(network)
    differences = unsaid(network)
    with whole_folder(folder, FILES) as unfinished:
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_weights(unfinished, network, variables)
        card = CARD_TEXT.format(architecture=config["architecture"], count=config["num_classes"])
        if differences:
            card += DIFFERS + "\n".join(f"- {each}" for each in differences) + "\n"
        (unfinished / CARD).write_text(card, "utf-8")
    for each in differences:
        logger.info(f"timm's form cannot say: {each}")


def push(where: str | os.PathLike[str], repository: str, private: bool = False) -> str:
    """Uploads a network to the Hugging Face hub, in timm's form; returns its address there.

    Args:
        where: a folder that `hand_back` wrote, which goes up as it is, or the folder or the name of
            any network that it can write.
        repository: ``OWNER/NAME``; made if there is none.
        private: whether a new repository is.

    Raises:
        InputError: when the network cannot be read or written in timm's form, or the hub refuses.
    """
    network, variables = read_pretrained(where)
    if not is_name(where) and _in_timms_form(Path(where)):
        return upload(Path(where), FILES, repository, private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "network"
        hand_back(network, variables, folder)
        return upload(folder, FILES, repository, private)


def timm_config(network: Network) -> dict[str, Any]:
    """A network's ``config.json`` as timm writes it.

    Raises:
        InputError: when the network is none of timm's.
    """
    model, size, channels = network.model, network.image_size, network.image_shape[-1]
    name = timm_name(model)
    last_stage = model.channels * 2 ** (len(model.stage_sizes) - 1)
    resizing = _resizing(network)
    mean, std = network.normalization or Normalization((0.0,) * channels, (1.0,) * channels)
    return {
        "architecture": name,
        "num_classes": len(network.classes),
        "num_features": last_stage * (4 if model.block is Bottleneck else 1),
        "global_pool": "avg",
        "label_names": list(network.classes),
        # What timm takes for granted is left out: three channels.
        **({} if channels == 3 else {"model_args": {"in_chans": channels}}),
        "pretrained_cfg": {
            "num_classes": len(network.classes),
            "input_size": [channels, size, size],
            "fixed_input_size": False,
            "interpolation": resizing.interpolation,
            "crop_pct": crop_share(size, resizing.side),
            "crop_mode": "squash" if resizing.squash else "center",
            "mean": list(mean),
            "std": list(std),
            "first_conv": "conv1.0" if model.stem == "deep" else "conv1",
            "classifier": "fc",
        },
    }


def timm_name(model: ResNet) -> str:
    """A network's name in timm, whatever its classes and what matters in training alone.

    Raises:
        InputError: when it has none.
    """
    replaced = model.replace_stride_with_dilation
    plain = model.clone(
        momentum=0.1,
        zero_init_residual=False,
        dropout_rate=0.0,
        stochastic_depth_rate=0.0,
        replace_stride_with_dilation=replaced if any(replaced) else (),
    )
    name, flavour = architecture(plain) or ("", "")
    if flavour == "torchvision" and model.stem != "small":
        return name
    known = [key for key in ARCHITECTURES if build_model(key).stem != "small"]
    raise InputError(
        f"timm and transformers have no such network: {_why_not(plain, name, flavour)}; they have "
        f"{', '.join(known)}, in torchvision's flavour"
    )


def unsaid(network: Network) -> list[str]:
    """What resnet_flax does with pictures and logits that timm's form cannot say, a line each."""
    height, width, channels = network.image_shape
    size, resizing = network.image_size, network.resizing
    padded = resizing is None and network.fit == "pad"
    dtype = describe_model(network.model)["dtype"]
    lines = {
        "here logits are averaged with the mirror image's, there not": network.flip,
        "here pictures that are no square are padded, there their middle is cropped": padded,
        "here bright grounds of pictures are inverted, there not": (
            padded and channels == 1 and network.dark_background
        ),
        "here pictures that are no square are cropped and then resized, there resized first": (
            resizing is None and not padded
        ),
        f"here pictures become {height}x{width} before {size}x{size}, there at once": (
            (height, width) != (size, size)
        ),
        "here half of an odd margin is rounded down, there to an even number": (
            resizing is not None and resizing.rounds_down
        ),
        "here pictures become grey by themselves, there by convert('L')": channels == 1,
        f"here logits are computed in {dtype}, there in float32": dtype != "float32",
    }
    return [line for line, differs in lines.items() if differs]


def crop_share(size: int, side: int) -> float:
    """The ``crop_pct`` from which timm's ``floor(size / crop_pct)`` gives the side."""
    share = size / side
    while math.floor(size / share) < side:  # rounded to less
        share = math.nextafter(share, 0)
    return share


def _resizing(network: Network) -> Resizing:
    height, width, _ = network.image_shape
    size, resizing = network.image_size, network.resizing
    if resizing is None:
        return Resizing(size, squash=height != width)
    return resizing._replace(side=max(size, round(resizing.side * size / height)))


def _in_timms_form(folder: Path) -> bool:
    for name in FILES:
        if (folder / name).exists():
            inside(folder, folder / name)
    return "architecture" in json.loads((folder / CONFIG).read_bytes())


def _why_not(model: ResNet, name: str, flavour: str) -> str:
    if flavour == "d2l":
        return (
            f"{name} of D2L's flavour has biased convolutions and shortcuts without normalisation"
        )
    if name:
        return f"{name} has the small stem"
    usual = describe_model(
        ResNet(model.stage_sizes, model.block, use_bias=False, norm_shortcut=True)
    )
    found = describe_model(model) | {"dtype": usual["dtype"]}
    shown = {"stage_sizes", *(field for field in found if found[field] != usual[field])}
    return ", ".join(f"{field} {found[field]!r:.100}" for field in found if field in shown)
