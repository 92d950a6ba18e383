"""Trains a residual network: flags, signals and printing around `resnet_flax.train`."""

import gc

from resnet_flax.commands.command_line import how_to_go_on, parse_config
from resnet_flax.machine.interruption import Interrupted, Interruption
from resnet_flax.machine.runtime import device_name
from resnet_flax.runs.run_folder import resolve
from resnet_flax.runs.train import train
from resnet_flax.training.position import EpochResult
from resnet_flax.training.progress import final_report


def main() -> None:
    """Reads the flags and trains, until it is done or asked to stop."""
    gc.freeze()  # what was imported stays: looking through it again costs each start half a second
    with Interruption() as interruption:
        config = resolve(parse_config())

        def print_epoch(result: EpochResult) -> None:
            print(
                f"epoch {result.epoch}/{config.epochs}: loss {result.loss:.3f}, "
                f"train acc {result.train_acc:.3f}, test acc {result.test_acc:.3f}, "
                f"{result.examples_per_sec:.1f} examples/sec, {result.seconds:.0f} s",
                flush=True,
            )

        try:
            run = train(config, epoch_ended=print_epoch, interruption=interruption)
        except Interrupted as stop:
            if stop.saved:
                stop.saved += f"; go on with: {how_to_go_on(config)}"
            raise
        if run.folder:
            print(final_report(run.results, device_name()))
