"""What a training run is asked to do, and which fields a recipe fills in."""

import dataclasses
import math
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from resnet_flax.errors import InputError
from resnet_flax.nn.resnet import ARCHITECTURES, DTYPES, FLAVOURS
from resnet_flax.training.recipes import RECIPES
from resnet_flax.weights import SAFETENSORS

# Fields that a pretrained network fills in.
TOLD = ("model", "flavour", "image_size", "normalization")


def _flag(description: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": description, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Each field is a flag of ``train.py``; its help text is its description.

    Fields that are left at None and that a `resnet_flax.training.Recipe` has are the recipe's; with
    ``resume``, fields that are not given, or None, are those of the run that goes on.

    Attributes:
        given: names of the fields that were given, and not None.

    Raises:
        InputError: when a value is out of range; the message names the field.
    """

    epochs: int = _flag("passes over the training set", at_least=1, at_most=10**6)
    batch_size: int = _flag("images in a training step", at_least=1)
    learning_rate: float = _flag(
        "step size of the optimiser, the largest where it changes; with the recipe imagenet it "
        "grows with the batch size where it is not given"
    )
    image_size: int = _flag(
        "height and width that images are resized to, in pixels", at_least=1, at_most=1024
    )
    model: str = _flag("network", choices=ARCHITECTURES)
    flavour: str = _flag("whose network: d2l, or torchvision", choices=FLAVOURS)
    recipe: str = _flag(
        "how to train, and the defaults of the flags above and of dtype and normalization: d2l as "
        "the book, fast, best, finetune, to start from other weights, or imagenet, torchvision's "
        "for ResNet-50 (default: d2l, or finetune where `init` is a network)",
        choices=RECIPES,
    )
    dataset: str = _flag(
        "fashion_mnist; another TFDS set of images by class, such as cifar10; or folder:PATH with "
        "images as PATH/CLASS/*.png (or .jpg), or PATH/train/CLASS and PATH/test/CLASS (or val)",
        "fashion_mnist",
    )
    follow_links: bool = _flag("let links in folder:PATH lead out of it", False)
    stream: str = _flag(
        "decode images while training, in the place of keeping all in memory: auto, where they "
        "would take more than a quarter of it; always; or never",
        "auto",
        choices=("auto", "always", "never"),
    )
    workers: int | None = _flag(
        "processes that decode streamed images; 0 does it in this one (default: as many "
        "as there are cores, at most 16)",
        at_least=0,
        at_most=1000,
    )
    draft: bool = _flag(
        "decode large streamed JPEGs at a half, quarter or eighth of their size where a random "
        "crop has pixels enough then: quicker, and other pixels",
        False,
    )
    skip_broken: bool = _flag("go on without images that cannot be read, and tell of them", False)
    init: str | None = _flag(
        "start from a pretrained network, by a name such as timm/resnet18.a1_in1k or "
        "torchvision/resnet50 or by its folder, and take its architecture, image size and "
        "normalization where no flag says otherwise; or from the weights in a .safetensors file, "
        "under D2L's, torchvision's, timm's or Hugging Face's names. Another number of classes or "
        "channels is adapted",
    )
    normalization: str | None = _flag(
        "what is taken off the images' channels, and what they are divided by: imagenet's, or none "
        "(default: those of the `init` network, or none; imagenet's with the recipe imagenet)",
        choices=("imagenet", "none"),
    )
    freeze_stages: int = _flag(
        "leave the first N parts of the network as they are: 1 the stem, 2 the first stage too, "
        "and so on; their batch normalisations keep their statistics, and normalise by them",
        0,
        at_least=0,
    )
    seed: int = _flag(
        "decides initial weights and order of images", 0, at_least=0, at_most=2**32 - 1
    )
    normalization_groups: int = _flag(
        "normalise parts of each batch apart, N of them, such as one for each eight devices: less "
        "waiting for messages",
        1,
        at_least=1,
    )
    dtype: str = _flag("of the computation; parameters stay float32", choices=DTYPES)
    data_dir: Path | None = _flag("folder of the TFDS data sets (default: TFDS' own)")
    run_dir: Path | None = _flag("folder of this run (default: runs/DATE-TIME)")
    resume: bool = _flag(
        "go on from the last checkpoint of the run folder, or of the newest run", False
    )
    checkpoint_seconds: float = _flag(
        "seconds of training between two checkpoints within an epoch; its end is always kept",
        120.0,
        at_least=0,
    )
    tensorboard: bool = _flag("write event files for TensorBoard into the run folder", False)
    deterministic: bool = _flag(
        "the same bits in every run on the same machine, on a GPU too; a CPU needs no flag",
        False,
    )
    coordinator: str | None = _flag(
        "HOST:PORT of the first process, when a run has several; SLURM and Open MPI need no flags",
    )
    num_processes: int | None = _flag("how many processes the run has", at_least=1)
    process_id: int | None = _flag("which of them this one is, from 0", at_least=0)
    train_examples: int | None = _flag(
        "train on the first N images only (default: all)", at_least=1
    )
    test_examples: int | None = _flag("test on the first N images only (default: all)", at_least=1)
    validation_examples: int | None = _flag(
        "for choices that must not see the test set: keep the last N training images out of "
        "training, and test on them instead",
        at_least=1,
    )

    given: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Notes which fields are given: once it is made, defaults look like them."""
        names = (each.name for each in dataclasses.fields(cls))
        given = {**dict(zip(names, values, strict=False)), **named}
        self = super().__new__(cls)
        told = frozenset(name for name, value in given.items() if value is not None)
        object.__setattr__(self, "given", told)
        return self

    def __post_init__(self) -> None:
        if self.init is not None:
            object.__setattr__(self, "init", os.fspath(self.init))
        if self.recipe is None:
            object.__setattr__(self, "recipe", "finetune" if self.from_network else "d2l")
        if self.recipe in RECIPES:  # else the loop below says so
            for name, default in RECIPES[self.recipe].defaults(self.batch_size).items():
                if getattr(self, name) is None and not (self.from_network and name in TOLD):
                    object.__setattr__(self, name, default)
        for option in dataclasses.fields(self):
            name, value, rule = f"`{option.name}`", getattr(self, option.name), option.metadata
            if value is None:
                continue
            if "choices" in rule and value not in rule["choices"]:
                choices = ", ".join(rule["choices"])
                raise InputError(f"unknown {name} {value!r}: choose from {choices}")
            if "at_least" in rule and value < rule["at_least"]:
                raise InputError(f"{name} must be at least {rule['at_least']}, not {value}")
            if "at_most" in rule and value > rule["at_most"]:
                raise InputError(f"{name} must be at most {rule['at_most']}, not {value}")
        if self.batch_size % self.normalization_groups:
            raise InputError(
                "`batch_size` must be a multiple of `normalization_groups`, "
                f"{self.normalization_groups}, not {self.batch_size}"
            )
        if not math.isfinite(self.checkpoint_seconds):
            raise InputError("`checkpoint_seconds` must be finite")
        if self.stream == "always" and self.dataset == "fashion_mnist":
            raise InputError(
                "`stream` always is for folders and other TFDS sets than fashion_mnist"
            )
        processes = (self.coordinator, self.num_processes, self.process_id)
        if len({value is None for value in processes}) > 1:
            raise InputError("`coordinator`, `num_processes` and `process_id` belong together")
        if self.coordinator is not None and not re.fullmatch(r"[\w.:\[\]-]+:\d+", self.coordinator):
            raise InputError(f"`coordinator` must be HOST:PORT, not {self.coordinator!r}")
        if (self.process_id or 0) >= (self.num_processes or 1):
            raise InputError(
                f"`process_id` must be less than `num_processes`, not {self.process_id}"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"`learning_rate` must be a positive number, not {self.learning_rate}")

    @property
    def from_network(self) -> bool:
        """Whether it starts from a network that tells its architecture and preprocessing."""
        return _is_network(self.init)


def _is_network(init: Any) -> bool:
    return isinstance(init, str) and not init.endswith(SAFETENSORS)


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration in JSON's types."""
    fields = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def from_json(content: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `as_json`, for content from anywhere; other things in it are passed over.

    Raises:
        ValueError: when a value that recipes decide is missing, since theirs may have changed, or
            any is of the wrong kind or out of range.
    """
    fields: dict[str, Any] = {}
    hints = typing.get_type_hints(TrainConfig)
    for option in dataclasses.fields(TrainConfig):
        name, value = option.name, content.get(option.name)
        kind = (typing.get_args(hints[name]) or (hints[name],))[0]  # of `int | None`
        if value is None:
            told = name in TOLD and _is_network(content.get("init"))
            if RECIPES["d2l"].defaults().get(name) is not None and not told:
                raise ValueError(f"it does not say `{name}`")
            continue
        written = {Path: (str,), float: (int, float)}.get(kind, (kind,))
        if type(value) not in written or "\0" in str(value):  # which no path can hold
            raise ValueError(f"`{name}` cannot be {value!r:.100}")
        fields[name] = kind(value)
    return TrainConfig(**fields)
