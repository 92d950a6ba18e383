"""For other programs: ``python -m resnet_flax export NETWORK --to onnx``, or ``--to stablehlo``."""

from pathlib import Path

from resnet_flax.commands.command_line import NETWORK, OneLineParser
from resnet_flax.inference.export import FORMATS, export, image_shape
from resnet_flax.machine.runtime import configure_runtime


def main() -> None:
    """Reads the command line, exports, and says what and where to."""
    does = "Writes a trained network for programs without this package."
    parser = OneLineParser("python -m resnet_flax export", description=does, allow_abbrev=False)
    parser.add_argument("network", metavar="NETWORK", help=NETWORK)
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument(
        "--output", type=Path, help="(default: model.stablehlo, .onnx in the folder)"
    )
    options = parser.parse_args()
    configure_runtime()
    path, network = export(options.network, options.to, options.output)
    images = ", ".join(map(str, ("N", *image_shape(network))))
    averaged = ", averaged with the mirror image's" if network.flip else ""
    print(f"{path}: from images ({images}) to {len(network.classes)} logits{averaged}, checked")
