"""How good is it: ``python -m resnet_flax evaluate NETWORK``, on the test set.

Instead of a run folder it takes a checkpoint from elsewhere too:
``python -m resnet_flax evaluate FILE.safetensors --model resnet18``.
"""

import json
from pathlib import Path

from resnet_flax.commands.command_line import NETWORK, OneLineParser
from resnet_flax.errors import InputError
from resnet_flax.inference import Scores, evaluate, load_test_set, read_pretrained, read_weights
from resnet_flax.inference.scores import as_text
from resnet_flax.machine.runtime import configure_runtime, keep_compiled_programs, start_backend
from resnet_flax.nn.resnet import ARCHITECTURES, FLAVOURS
from resnet_flax.runs.config import TrainConfig
from resnet_flax.weights import SAFETENSORS

IMAGE_SIZE = 96  # of D2L's recipe
FOLLOW_LINKS = TrainConfig.__dataclass_fields__["follow_links"].metadata["help"]


def main() -> None:
    """Reads the command line, and prints the scores."""
    does = "Scores a trained network on its data's test set."
    parser = OneLineParser("python -m resnet_flax evaluate", description=does, allow_abbrev=False)
    named = f"{NETWORK}; or FILE.safetensors"
    parser.add_argument("network", metavar="NETWORK", help=named)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--model", choices=ARCHITECTURES, help="network of FILE.safetensors")
    flavour = "its flavour (default: d2l if its convolutions have biases)"
    parser.add_argument("--flavour", choices=FLAVOURS, help=flavour)
    pixels = f"that it was trained with (default: {IMAGE_SIZE})"
    parser.add_argument("--image-size", type=int, help=pixels)
    dataset = (
        "whose test set, as of train.py (default: what the run was trained on, but for a folder)"
    )
    parser.add_argument("--dataset", help=dataset)
    parser.add_argument("--data-dir", type=Path, help="folder of the TFDS data sets")
    parser.add_argument("--follow-links", action="store_true", help=FOLLOW_LINKS)
    parser.add_argument("--test-examples", type=int, help="score on the first N images only")
    options = parser.parse_args()
    configure_runtime()
    keep_compiled_programs()
    start_backend()
    path = Path(options.network)
    if path.name.endswith(SAFETENSORS):
        if options.model is None:
            raise InputError(f"which network is in {path}? Add --model")
        size = IMAGE_SIZE if options.image_size is None else options.image_size
        network, variables = read_weights(path, options.model, options.flavour, size)
    elif options.model or options.flavour or options.image_size is not None:
        raise InputError("--model, --flavour and --image-size are for a .safetensors file")
    else:
        network, variables = read_pretrained(options.network)
    test_data = load_test_set(network, options.dataset, options.data_dir, options.follow_links)
    scores = evaluate(network, variables, test_data.take(options.test_examples))
    print((as_json if options.json else as_table)(scores, network.classes))


def as_table(scores: Scores, classes: tuple[str, ...]) -> str:
    """A table of precision and recall, and the figures."""
    width = max(len(name) for name in ("class", *classes))
    rows = [f"{'class':<{width}}  precision  recall"]
    for name, precision, recall in zip(classes, scores.precision, scores.recall, strict=True):
        rows.append(f"{name:<{width}}  {as_text(precision):>9}  {as_text(recall):>6}")
    figures = (
        f"accuracy {scores.accuracy:.4f}, loss {scores.loss:.4f}, "
        f"calibration error {scores.calibration_error:.4f} on {scores.confusion.sum():,} images"
    )
    return "\n".join([*rows, "", figures])


def as_json(scores: Scores, classes: tuple[str, ...]) -> str:
    """The same for a program; what is not defined is null."""
    shares = zip(classes, scores.precision, scores.recall, strict=True)
    content = {
        "examples": int(scores.confusion.sum()),
        "accuracy": scores.accuracy,
        "loss": scores.loss,
        "calibration_error": scores.calibration_error,
        "classes": {name: {"precision": p, "recall": r} for name, p, r in shares},
        "confusion": scores.confusion.tolist(),
    }
    return json.dumps(content, indent=2)
