"""What is in these pictures: ``python -m resnet_flax predict NETWORK IMAGE...``."""

import json
from collections.abc import Sequence
from pathlib import Path

from resnet_flax.commands.command_line import NETWORK, OneLineParser
from resnet_flax.data import printable
from resnet_flax.inference import Prediction, predict
from resnet_flax.machine.runtime import configure_runtime, keep_compiled_programs


def main() -> None:
    """Reads the command line, and prints what the images show."""
    does = (__doc__ or "").partition(":")[0] + "."
    parser = OneLineParser("python -m resnet_flax predict", description=does, allow_abbrev=False)
    parser.add_argument("network", metavar="NETWORK", help=NETWORK)
    named = "PNG or JPEG file of any size"
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help=named)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    configure_runtime()
    keep_compiled_programs()
    predictions = predict(options.network, options.images)
    print(as_json(predictions) if options.json else as_table(predictions))


def as_table(predictions: Sequence[Prediction]) -> str:
    """A line for each image, its answers in columns."""
    rows = [
        [
            printable(each.image) + (" (inverted: light background)" if each.inverted else ""),
            *(f"{name} {share:.1%}" for name, share in each.top),
        ]
        for each in predictions
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_json(predictions: Sequence[Prediction]) -> str:
    """The same for a program."""
    keys = ("class", "probability")
    listed = [
        each._asdict() | {"top": [dict(zip(keys, answer, strict=True)) for answer in each.top]}
        for each in predictions
    ]
    return json.dumps(listed, indent=2)
