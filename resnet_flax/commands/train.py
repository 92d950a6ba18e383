"""Trains a residual network: flags, signals and printing around `resnet_flax.train`."""

import gc

from resnet_flax.commands.command_line import parse_config
from resnet_flax.machine.interruption import Interruption
from resnet_flax.machine.runtime import device_name
from resnet_flax.runs.train import train
from resnet_flax.training.position import EpochResult
from resnet_flax.training.progress import final_report


def main() -> None:
    """Reads the flags and trains, until it is done or asked to stop."""
    gc.freeze()  # what was imported stays: looking through it again costs each start half a second
    with Interruption() as interruption:
        config = parse_config()

        def print_epoch(result: EpochResult) -> None:
            print(
                f"epoch {result.epoch}/{config.epochs}: loss {result.loss:.3f}, "
                f"train acc {result.train_acc:.3f}, test acc {result.test_acc:.3f}, "
                f"{result.examples_per_sec:.1f} examples/sec, {result.seconds:.0f} s",
                flush=True,
            )

        run = train(config, epoch_ended=print_epoch, interruption=interruption)
        if run.folder:
            print(final_report(run.results, device_name()))
