"""Pictures of a run."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_flax.metrics import EpochResult


def plot_curves(results: list[EpochResult], path: Path) -> None:
    """Draws D2L's picture: training loss, training and test accuracy over the epochs.

    Args:
        results: one for each epoch.
        path: the .png to write.
    """
    epochs = [result.epoch for result in results]
    figure = Figure(figsize=(5, 3.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylim=(0, 1))
    axes.plot(epochs, [r.loss for r in results], "o-", label="train loss")
    axes.plot(epochs, [r.train_acc for r in results], "s--", label="train acc")
    axes.plot(epochs, [r.test_acc for r in results], "^:", label="test acc")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.4)
    axes.legend()
    figure.savefig(path)
