"""The model card: a run's ``README.md``, with the front matter that Hugging Face's hub reads."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from resnet_flax.inference.pretrained import Network
from resnet_flax.inference.scores import Scores, as_text
from resnet_flax.runs import run_folder
from resnet_flax.runs.config import TrainConfig, as_json
from resnet_flax.training.position import EpochResult

# A run rewrites a card only while this line is in it.
MARK = "# Written by resnet_flax at the end of a run. Delete this line to keep your own changes."
FLAGS = ("model", "recipe", "epochs", "batch_size", "learning_rate", "image_size", "seed", "dtype")
# What Hugging Face's hub calls the data, and their licence; of others that is not known.
HUB = {"fashion_mnist": ("Fashion-MNIST", "zalando-datasets/fashion_mnist", "license: mit\n")}
MIRRORED = "(Each image's logits are averaged with its mirror image's.)\n"

CARD = """---
{mark}
library_name: flax
{license}pipeline_tag: image-classification
tags: [jax, flax, resnet, image-classification, resnet_flax]
datasets: [{hub_name}]
metrics: [accuracy]
model-index:
- name: {yaml_name}
  results:
  - task:
      type: image-classification
    dataset:
      name: {yaml_title}
      type: {hub_name}
      split: {split}
    metrics:
    - type: accuracy
      value: {accuracy:.4f}
---

# {name}

A residual network in JAX and Flax, {origin} on {title} by resnet_flax. It tells {count} classes
apart: {names}.

On {examples:,} {split} images its accuracy is **{accuracy:.4f}**, its cross-entropy {loss:.4f}, and
its expected calibration error (15 bins) {calibration_error:.4f}.
{flip}

![Images with their true and predicted classes]({run_folder.PREDICTIONS})

## How to use it

From image files:

```bash
python -m resnet_flax predict FOLDER photo.jpg
```

In Python, with images as float32 in [0, 1] of shape (N, {size}, {size}, {channels}){normalized}:

```python
from resnet_flax import from_pretrained

model, variables = from_pretrained("FOLDER")  # where config.json and model.safetensors are
logits = model.apply(variables, images)
```

The network was trained on images of {height}x{width} pixels{ground}. It takes them at {size}x{size}
(resized as Pillow's {interpolation} filter does it), divided by 255, and {normalization}. Pictures
from elsewhere differ from the data set's: expect more mistakes on them.

`model.safetensors` has PyTorch's names and order of axes ({layout}'s network).

## How it was trained

```bash
python train.py {flags}
```

{epochs}

![Loss and accuracy over the epochs]({run_folder.CURVES})

## Where it errs

{by_class}

![Confusion matrix]({run_folder.CONFUSION})

![The mistakes of which it was surest]({run_folder.MISTAKES})
"""


def model_card(
    config: TrainConfig, network: Network, results: Sequence[EpochResult], scores: Scores
) -> str:
    """The card of a finished run, Markdown with front matter in YAML.

    The scores are those on the test set, or on the images kept out of training in its place.
    """
    height, width, channels = network.image_shape
    split = "validation" if config.validation_examples else "test"
    figures = [(row.loss, row.train_acc, row.test_acc) for row in results]
    epochs = [(number, *map(as_text, row)) for number, row in enumerate(figures, 1)]
    shares = [map(as_text, column) for column in (scores.precision, scores.recall)]
    by_class = zip(network.classes, *shares, strict=True)
    plain = TrainConfig(recipe=config.recipe, init=config.init)
    others = [name for name in as_json(config) if name not in {*FLAGS, *run_folder.FREE_FIELDS}]
    flags = [*FLAGS, *(name for name in others if getattr(config, name) != getattr(plain, name))]
    dataset = Path(config.dataset).name
    title, hub_name, license = HUB.get(dataset, (dataset, json.dumps(dataset), ""))
    resizing, normalization = network.resizing, "not normalised"
    if network.normalization:
        mean, std = network.normalization.as_text()
        normalization = f"normalised by mean ({mean}) and standard deviation ({std})"
    name = f"{config.model or 'resnet'}-{dataset.replace('_', '-')}"
    return CARD.format(
        mark=MARK,
        run_folder=run_folder,
        **scores._asdict(),
        name=name,
        yaml_name=json.dumps(name),
        title=title,
        yaml_title=json.dumps(title),
        hub_name=hub_name,
        license=license,
        origin=f"fine-tuned from {_source(config.init)}" if config.init else "trained from scratch",
        split=split,
        examples=scores.confusion.sum(),
        count=len(network.classes),
        names=", ".join(network.classes),
        flip=MIRRORED if network.flip else "",
        height=height,
        width=width,
        channels=channels,
        size=network.image_size,
        normalized=", then normalised" if network.normalization else "",
        normalization=normalization,
        interpolation=resizing.interpolation if resizing else "bilinear",
        ground=", light on dark" if network.dark_background and channels == 1 else "",
        layout="torchvision" if network.model.norm_shortcut else "D2L",
        flags=" ".join(f"--{flag.replace('_', '-')} {getattr(config, flag)}" for flag in flags),
        epochs=_table(("epoch", "training loss", "training accuracy", f"{split} accuracy"), epochs),
        by_class=_table(("class", "precision", "recall"), by_class),
    )


def _source(init: str) -> str:
    return Path(init).name if Path(init).exists() else init


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
