"""How good is it: ``python -m resnet_flax.evaluate RUN_DIR``, on the test set.

Instead of a run folder it takes a checkpoint from elsewhere too:
``python -m resnet_flax.evaluate FILE.safetensors --model resnet18``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from resnet_flax.commands.command_line import OneLineParser, run_command
from resnet_flax.data import FASHION_MNIST_CLASSES, FOLDER, Dataset, load_dataset
from resnet_flax.errors import InputError
from resnet_flax.inference.predict import compute_logits
from resnet_flax.inference.pretrained import LARGEST_IMAGE, Network, read_pretrained
from resnet_flax.inference.scores import Scores, as_text, score
from resnet_flax.machine.runtime import configure_runtime, keep_compiled_programs
from resnet_flax.nn.resnet import ARCHITECTURES, FLAVOURS
from resnet_flax.weights import from_torch, guess_model, load_safetensors


def evaluate(network: Network, variables: Any, data: Dataset) -> Scores:
    """Scores a network on a test set.

    Args:
        network: as `resnet_flax.inference.pretrained.read_pretrained` returns it, with its variables.
        variables: of ``network.model``.
        data: with the network's classes.

    Raises:
        InputError: when the network takes other images, or tells other classes apart.
    """
    if data.images.shape[-1] != network.image_shape[-1]:
        raise InputError(
            f"the network takes images of {network.image_shape[-1]} channels; "
            f"the test set's have {data.images.shape[-1]}"
        )
    if len(network.classes) <= data.labels.max():
        raise InputError(
            f"the network tells {len(network.classes)} classes apart; "
            f"the test set has {data.labels.max() + 1}"
        )
    return score(compute_logits(network, variables, data.images), data.labels)


def report(scores: Scores, classes: tuple[str, ...]) -> str:
    """The figures, and a table of precision and recall."""
    width = max(len(name) for name in ("class", *classes))
    rows = [f"{'class':<{width}}  precision  recall"]
    for name, precision, recall in zip(classes, scores.precision, scores.recall, strict=True):
        rows.append(f"{name:<{width}}  {as_text(precision):>9}  {as_text(recall):>6}")
    return "\n".join(
        [
            *rows,
            "",
            f"accuracy {scores.accuracy:.4f}, loss {scores.loss:.4f}, "
            f"calibration error {scores.calibration_error:.4f} "
            f"on {scores.confusion.sum():,} images",
        ]
    )


def as_json(scores: Scores, classes: tuple[str, ...]) -> dict[str, Any]:
    """The same for a program; what is not defined is null."""
    return {
        "examples": int(scores.confusion.sum()),
        "accuracy": scores.accuracy,
        "loss": scores.loss,
        "calibration_error": scores.calibration_error,
        "classes": {
            name: {"precision": precision, "recall": recall}
            for name, precision, recall in zip(
                classes, scores.precision, scores.recall, strict=True
            )
        },
        "confusion": scores.confusion.tolist(),
    }


def main() -> None:
    """Reads the command line, and prints the scores."""
    options = parse_arguments()
    configure_runtime()
    keep_compiled_programs()
    if options.path.suffix == ".safetensors":
        network, variables = read_checkpoint(options)
    elif options.model or options.flavour or options.image_size:
        raise InputError("--model, --flavour and --image-size are for a .safetensors file")
    else:
        network, variables = read_pretrained(options.path)
    test_data = load_test_set(network, options.dataset, options.data_dir)
    scores = evaluate(network, variables, test_data.take(options.test_examples))
    if options.json:
        print(json.dumps(as_json(scores, network.classes), indent=2))
    else:
        print(report(scores, network.classes))


def load_test_set(network: Network, name: str | None, data_dir: Path | None) -> Dataset:
    """Loads the test set of the data that a network was trained on, or of others.

    Raises:
        InputError: when it cannot be loaded, has other classes, or is a folder that only the run
            names: a stranger's run shall not choose what is read.
    """
    if name is None and network.dataset.startswith(FOLDER):
        raise InputError(
            f"the network was trained on {network.dataset}: name the folder by --dataset"
        )
    splits = load_dataset(
        name or network.dataset, data_dir, image_size=network.image_size, seed=network.seed
    )
    if splits.classes != network.classes:
        raise InputError(
            f"the network tells {len(network.classes)} classes apart, "
            f"{', '.join(network.classes):.100}; the data set has {len(splits.classes)}, "
            f"{', '.join(splits.classes):.100}"
        )
    return splits.test


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        prog="python -m resnet_flax.evaluate",
        description="Scores a trained network on its data's test set.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN_DIR", help="run folder, or FILE.safetensors"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--model", choices=ARCHITECTURES, help="network of FILE.safetensors")
    parser.add_argument(
        "--flavour",
        choices=FLAVOURS,
        help="its flavour (default: d2l if the first convolution has a bias)",
    )
    parser.add_argument("--image-size", type=int, help="that it was trained with (default: 96)")
    parser.add_argument(
        "--dataset", help="whose test set, as of train.py (default: what the run was trained on)"
    )
    parser.add_argument("--data-dir", type=Path, help="folder of the TFDS data sets")
    parser.add_argument("--test-examples", type=int, help="score on the first N images only")
    return parser.parse_args()


def read_checkpoint(options: argparse.Namespace) -> tuple[Network, dict[str, Any]]:
    """Reads the PyTorch weights of a network that the options name."""
    if options.model is None:
        raise InputError(f"which network is in {options.path}? Add --model")
    size = options.image_size or 96
    if not 1 <= size <= LARGEST_IMAGE:
        raise InputError(f"--image-size must be between 1 and {LARGEST_IMAGE}, not {size}")
    state_dict = load_safetensors(options.path)
    model = guess_model(options.model, state_dict, options.flavour)
    variables = from_torch(model, state_dict)
    channels = variables["params"]["conv1"]["kernel"].shape[2]
    classes = FASHION_MNIST_CLASSES
    if model.num_classes != len(classes):
        raise InputError(
            f"{options.path} tells {model.num_classes} classes apart; Fashion-MNIST has "
            f"{len(classes)}"
        )
    return Network(model, classes, (28, 28, channels), size), variables


if __name__ == "__main__":
    sys.exit(run_command(main))
