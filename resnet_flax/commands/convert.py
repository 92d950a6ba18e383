"""Rewrites a PyTorch checkpoint in another layout of keys or another file format.

``python -m resnet_flax convert resnet50.pth model.safetensors --model resnet50 --to huggingface``
"""

from pathlib import Path

from resnet_flax.commands.command_line import OneLineParser
from resnet_flax.machine.runtime import start_backend
from resnet_flax.nn.resnet import ARCHITECTURES, FLAVOURS, STEMS
from resnet_flax.weights import LAYOUTS, convert, guess_model, read_checkpoint, write_checkpoint


def main() -> None:
    """Reads the command line, converts, and says what was written."""
    description = (__doc__ or "").partition("\n")[0]
    parser = OneLineParser("python -m resnet_flax convert", description=description)
    parser.add_argument("input", type=Path, metavar="IN", help="checkpoint; its layout is detected")
    parser.add_argument("output", type=Path, metavar="OUT", help="file to write or replace")
    parser.add_argument("--model", required=True, choices=ARCHITECTURES)
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout of the keys in OUT")
    whose = "whose network it is (default: d2l if its convolutions have biases)"
    part = "which of several state dicts in IN, such as state_dict_ema (default: not an average)"
    parser.add_argument("--part", help=part)
    parser.add_argument("--flavour", choices=FLAVOURS, help=whose)
    dtypes = ["float32", "float16", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, help="(default: that of IN)")
    parser.add_argument("--stem", choices=STEMS, help="(default: as IN tells, or the model's)")
    width = "where IN's shapes do not tell it to the digit"
    parser.add_argument("--width-multiplier", type=float, help=width)
    options = parser.parse_args()
    state_dict = read_checkpoint(options.input, options.part)
    start_backend()
    given = {"stem": options.stem, "width_multiplier": options.width_multiplier}
    fields = {name: value for name, value in given.items() if value is not None}
    model = guess_model(options.model, state_dict, options.flavour, **fields)
    converted = convert(model, state_dict, options.to, options.dtype)
    write_checkpoint(options.output, converted)
    print(f"{options.output}: {len(converted)} tensors, {options.to}'s keys")
