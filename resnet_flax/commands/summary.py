"""D2L's table of output shapes: ``python -m resnet_flax summary --model resnet18``."""

import sys
from collections.abc import Sequence

from resnet_flax.commands.command_line import NETWORK, OneLineParser, flag
from resnet_flax.errors import InputError
from resnet_flax.inference.pretrained import read_network
from resnet_flax.machine.runtime import start_backend
from resnet_flax.nn.resnet import ARCHITECTURES, FLAVOURS, build_model
from resnet_flax.nn.summary import Row, summarize

LARGEST = 10**6


def main() -> None:
    """Prints the table of the network that the flags name."""
    parser = OneLineParser("python -m resnet_flax summary", allow_abbrev=False)
    parser.add_argument("network", nargs="?", metavar="NETWORK", help=f"{NETWORK}; without flags")
    parser.add_argument("--model", default="resnet18", choices=ARCHITECTURES)
    parser.add_argument("--flavour", default="d2l", choices=FLAVOURS)
    parser.add_argument("--image-size", type=int, default=224, help="in pixels (default: 224)")
    parser.add_argument("--channels", type=int, default=1, help="of the image (default: 1)")
    parser.add_argument("--classes", type=int, default=10, help="outputs (default: 10)")
    options = parser.parse_args()
    for name in ("image_size", "channels", "classes"):
        given = getattr(options, name)
        if given < 1:
            raise InputError(f"{flag(name)} must be at least 1")
        if given > LARGEST:
            raise InputError(f"{flag(name)} must be at most {LARGEST}")
    start_backend()
    if options.network:
        if flags := [each for each in sys.argv if each.startswith("--")]:
            raise InputError(f"{flags[0]} is for a network that is built, not {options.network}")
        network = read_network(options.network)
        print_table(summarize(network.model, network.image_size, network.image_shape[-1]))
        return
    model = build_model(options.model, options.flavour, num_classes=options.classes)
    print_table(summarize(model, options.image_size, options.channels))


def print_table(rows: Sequence[Row]) -> None:
    """Prints the rows and their sums on stdout."""
    print(f"{'layer':<20} {'output (H, W, C)':<18} {'parameters':>12} {'multiply-adds':>16}")
    for row in rows:
        print(f"{row.layer:<20} {row.output!s:<18} {row.parameters:>12,} {row.multiply_adds:>16,}")
    parameters, multiply_adds = (sum(column) for column in list(zip(*rows, strict=True))[2:])
    print(f"{'total':<39} {parameters:>12,} {multiply_adds:>16,}")
