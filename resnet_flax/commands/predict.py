"""What is in these pictures: ``python -m resnet_flax.predict RUN_DIR IMAGE...``.

The images are PNG or JPEG files of any size. They are made as the training images were: for
Fashion-MNIST grey, small, and light on dark, so that a photo on a white ground is inverted.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_flax.commands.command_line import OneLineParser, run_command
from resnet_flax.data import printable, read_photos
from resnet_flax.errors import InputError
from resnet_flax.inference.predict import compute_logits
from resnet_flax.inference.pretrained import read_pretrained
from resnet_flax.inference.scores import softmax
from resnet_flax.machine.runtime import configure_runtime, keep_compiled_programs

MOST_ANSWERS = 3


class Prediction(NamedTuple):
    """What a network makes of one image.

    Attributes:
        image: its path.
        inverted: whether it had a bright background and was inverted.
        top: the likeliest classes with their probabilities, the likeliest first.
    """

    image: str
    inverted: bool
    top: list[tuple[str, float]]


def predict(
    run: str | os.PathLike[str], images: Sequence[str | os.PathLike[str]]
) -> list[Prediction]:
    """Classifies image files.

    Args:
        run: a run folder, or one as for `resnet_flax.inference.pretrained.from_pretrained`.
        images: PNG or JPEG files, of any size.

    Returns:
        One prediction for each image, of the three likeliest classes.

    Raises:
        InputError: when the network or any of the images cannot be read.
    """
    network, variables = read_pretrained(run)
    if network.image_shape[-1] not in (1, 3):
        raise InputError(
            f"the network of {run} takes images of {network.image_shape[-1]} channels: "
            "files have 1 or 3"
        )
    photos = read_photos(
        images, network.image_shape, fit=network.fit, dark_background=network.dark_background
    )
    pixels = np.asarray([photo.pixels for photo in photos], np.uint8)
    pixels = pixels.reshape(-1, *network.image_shape)  # of no images too
    probabilities = softmax(compute_logits(network, variables, pixels))
    order = (-probabilities).argsort(-1, kind="stable")[:, :MOST_ANSWERS]
    return [
        Prediction(
            os.fspath(path),
            photo.inverted,
            [(network.classes[index], float(shares[index])) for index in best],
        )
        for path, photo, best, shares in zip(images, photos, order, probabilities, strict=True)
    ]


def table(predictions: Sequence[Prediction]) -> str:
    """A line for each image, its answers in columns."""
    rows = [
        [
            printable(each.image) + (" (inverted: light background)" if each.inverted else ""),
            *(f"{name} {share:.1%}" for name, share in each.top),
        ]
        for each in predictions
    ]
    columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main() -> None:
    """Reads the command line, and prints what the images show."""
    parser = OneLineParser(
        prog="python -m resnet_flax.predict",
        description=(__doc__ or "").partition(":")[0] + ".",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="PNG or JPEG file of any size"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    configure_runtime()
    keep_compiled_programs()
    predictions = predict(options.run, options.images)
    if options.json:
        listed = [each._asdict() | {"top": _named(each.top)} for each in predictions]
        print(json.dumps(listed, indent=2))
    else:
        print(table(predictions))


def _named(top: list[tuple[str, float]]) -> list[dict[str, object]]:
    return [{"class": name, "probability": share} for name, share in top]


if __name__ == "__main__":
    sys.exit(run_command(main))
