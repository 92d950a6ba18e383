"""For other programs: ``python -m resnet_flax export NETWORK --to onnx``.

Or ``--to stablehlo``, or ``--to huggingface``, which ``--push OWNER/NAME`` uploads.
"""

from pathlib import Path

from resnet_flax.commands.command_line import NETWORK, OneLineParser
from resnet_flax.inference import push
from resnet_flax.inference.export import CHOICES, HUGGINGFACE, export, image_shape
from resnet_flax.machine.runtime import configure_runtime


def main() -> None:
    """Reads the command line, exports, and says what and where to."""
    does = "Writes a trained network for programs without this package."
    parser = OneLineParser("python -m resnet_flax export", description=does, allow_abbrev=False)
    parser.add_argument("network", metavar="NETWORK", help=NETWORK)
    parser.add_argument("--to", required=True, choices=CHOICES)
    where = (
        "(default: model.stablehlo, model.onnx or huggingface, in the folder, or here for a name)"
    )
    parser.add_argument("--output", type=Path, help=where)
    uploads = "upload the huggingface folder to this repository on the Hugging Face hub"
    parser.add_argument("--push", metavar="OWNER/NAME", help=uploads)
    parser.add_argument("--private", action="store_true", help="of a new repository")
    options = parser.parse_args()
    if options.push and options.to != HUGGINGFACE:
        parser.error(f"--push needs --to {HUGGINGFACE}")
    if options.private and not options.push:
        parser.error("--private needs --push")
    configure_runtime()
    path, network = export(options.network, options.to, options.output)
    if options.to == HUGGINGFACE:
        print(f"{path}: {len(network.classes)} classes, for timm, transformers and resnet_flax")
    else:
        images = ", ".join(map(str, ("N", *image_shape(network))))
        averaged = ", averaged with the mirror image's" if network.flip else ""
        print(f"{path}: from images ({images}) to {len(network.classes)} logits{averaged}, checked")
    if options.push:
        print(push(path, options.push, options.private))
