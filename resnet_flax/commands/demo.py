"""A page for this machine's browser: ``python -m resnet_flax demo NETWORK``."""

from resnet_flax.commands.command_line import NETWORK, OneLineParser
from resnet_flax.inference import read_pretrained
from resnet_flax.machine.interruption import Interruption
from resnet_flax.machine.runtime import configure_runtime, keep_compiled_programs

LARGEST_PORT = 65535


def main() -> None:
    """Reads the command line, and serves the page until a signal ends it."""
    does = "Opens a page on this machine: drop a picture, see what the network makes of it."
    parser = OneLineParser("python -m resnet_flax demo", description=does, allow_abbrev=False)
    parser.add_argument("network", metavar="NETWORK", help=NETWORK)
    parser.add_argument("--port", type=int, default=0, help="(default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="only say where the page is")
    options = parser.parse_args()
    if not 0 <= options.port <= LARGEST_PORT:
        parser.error(f"--port must be from 0 to {LARGEST_PORT}, not {options.port}")
    from resnet_flax.inference.demo import demo_page, serve  # of an extra

    configure_runtime()
    keep_compiled_programs()
    with Interruption():
        network, variables = read_pretrained(options.network)
        page = demo_page(network, variables, options.network)
        serve(page, options.port, in_browser=not options.no_browser)
