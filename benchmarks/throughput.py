"""Training throughput of this library, of plain Flax and of PyTorch, side by side in one run.

``python -m benchmarks.throughput`` trains D2L's ResNet-18 on batches of 256 images of 96x96 pixels.
The contenders take turns, a few steps each, so that what else the machine does falls on all alike.
"train" counts the training steps alone, as D2L does; "end to end" adds reading the batches and
evaluating one image for every six trained, as an epoch of Fashion-MNIST does. Plain Flax appears
twice: in the environment as installed, and under this library's settings; these, and PyTorch, run
with the same settings of the C library's allocator and the same number of threads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.tables import Table, machine, output_flag, spread, versions
from resnet_flax.machine.runtime import BARRIER_FLAG, YNNPACK_FLAG
from resnet_flax.nn.resnet import build_model
from resnet_flax.nn.summary import summarize

# Both frameworks ask for gigabytes at each step; this keeps the C library from giving them back.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=17179869184"
}
SETTINGS = {**ALLOCATOR, "XLA_FLAGS": f"{YNNPACK_FLAG} {BARRIER_FLAG}"}


class Contender(NamedTuple):
    """One line of the table: what runs, with which options, in which environment."""

    name: str
    arguments: Sequence[str]
    environment: dict[str, str]


CONTENDERS = [
    Contender("resnet_flax", ["resnet_flax"], ALLOCATOR),
    Contender("plain Flax, as installed", ["plain_flax"], {}),
    Contender("plain Flax, our settings", ["plain_flax"], SETTINGS),
    Contender("PyTorch, contiguous", ["pytorch"], ALLOCATOR),
    Contender("PyTorch, channels_last", ["pytorch", "--channels-last"], ALLOCATOR),
]


def start(contender: Contender, options: argparse.Namespace) -> subprocess.Popen[str]:
    """Starts a contender's process; it compiles before it answers."""
    command = [sys.executable, "-m", "benchmarks.contenders", *contender.arguments]
    command += ["--model", options.model, "--batch-size", str(options.batch_size)]
    command += ["--image-size", str(options.image_size)]
    own = {"XLA_FLAGS", "GLIBC_TUNABLES"}
    inherited = {key: value for key, value in os.environ.items() if key not in own}
    return subprocess.Popen(
        command,
        env=inherited | contender.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str], order: Any = None) -> Any:
    """Sends an order, if any, and waits for the answer."""
    assert process.stdin
    assert process.stdout
    if order is not None:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f"{process.args!r}: stopped with exit code {process.wait()}")
    return json.loads(answer)


def main() -> None:
    """Prints the table and keeps it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="resnet18, ..., resnet152")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=96, help="in pixels")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="training steps in a turn")
    parser.add_argument("--only", nargs="*", default=(), help="names that contain one of these")
    output_flag(parser, "throughput")
    options = parser.parse_args()

    contenders = CONTENDERS
    if options.only:
        contenders = [
            each for each in contenders if any(name in each.name for name in options.only)
        ]
    processes, ready = {}, {}
    for contender in contenders:  # one after the other, so that each compiles undisturbed
        processes[contender.name] = start(contender, options)
        ready[contender.name] = ask(processes[contender.name])["ready"]
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for _ in range(options.rounds):
        for name, process in processes.items():
            ask(process, [1, 0])  # the system may have taken idle memory back
            answers[name].append(ask(process, [options.steps, 0]))
    for name, process in processes.items():  # 6 images trained for each one evaluated
        ask(process, [1, 0])
        answers[name].append(ask(process, [6, 1]))
        process.communicate()

    command = [sys.executable, "-m", "benchmarks.contenders", "roof"]
    gigaflops = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    side = options.image_size
    multiply_adds = sum(row.multiply_adds for row in summarize(build_model(options.model), side))
    roof = gigaflops * 1e9 / (3 * 2 * multiply_adds)
    print(f"{options.model}, batches of {options.batch_size} images, {side}x{side} pixels")
    print(f"{machine()}; {', '.join(' '.join(each) for each in versions().items())}\n")
    columns = ("images/s", "ours is", "end to end", "first step after, s", "peak GiB")
    table = Table(f"{side}x{side} pixels", *columns)
    rates = {name: [row["train"] for row in rows[:-1]] for name, rows in answers.items()}
    ours = rates[contenders[0].name]
    for name, rows in answers.items():
        ratios = [a / b for a, b in zip(ours, rates[name], strict=True)]
        last = (rows[-1]["both"], ready[name], rows[-1]["peak"])
        ratio = "" if rates[name] is ours else spread(ratios, 2, "x")
        table.add(name, spread(rates[name]), ratio, *(f"{each:.1f}" for each in last))
    share = statistics.median(ours) / roof
    print(f"\n{contenders[0].name} runs at {share:.0%} of {gigaflops:.0f} GFLOP/s, a product of")
    print(f"4096x4096 matrices in PyTorch; an image takes {gigaflops / roof:.2f} GFLOP, thrice the")
    print("forward convolutions'.")
    table.keep(options.output)


if __name__ == "__main__":
    main()
