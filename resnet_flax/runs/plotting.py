"""Pictures of a run: how it learned, and what the network takes for what."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resnet_flax.machine.files import whole_file
from resnet_flax.training.position import EpochResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
MOST_MARKERS = 25  # of a curve
WRONG = "crimson"
ROWS, COLUMNS = 4, 8
FEWEST_COLUMNS = 5  # as wide as the heading
MOST_NUMBERED = 20  # with more classes the confusion matrix keeps its colours, but no numbers
PLAIN = ("normal", 400, "normal", "scalable")  # a font's style, weight, stretch and size
LAST_RESORT = "Last Resort High-Efficiency"  # Matplotlib's font of boxes
LONGEST_NAME = 12  # letters that fit above an image
# Inches, of pictures of many images: each in a cell, below its title.
HEADING, CELL_WIDTH, CELL_HEIGHT, PICTURE, TITLE, GAP = 0.4, 1.35, 1.75, 1.27, 0.4, 0.04


def plot_curves(results: Sequence[EpochResult], path: Path) -> None:
    """Draws D2L's picture: training loss, training and test accuracy over the epochs."""
    epochs = [result.epoch for result in results]
    figure = _new_figure(5, 3.5)
    axes = figure.add_subplot(xlabel="epoch", ylim=(0, 1))
    last, between = len(epochs) - 1, -(-len(epochs) // MOST_MARKERS)
    plot = partial(axes.plot, epochs, markevery=[*range(last % between, last + 1, between)])
    plot([r.loss for r in results], "o-", label="train loss")
    plot([r.train_acc for r in results], "s--", label="train acc")
    plot([r.test_acc for r in results], "^:", label="test acc")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.4)
    axes.legend()
    _save(figure, path)


def plot_confusion(confusion: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draws which classes are taken for which: a row for each true class, in shares of the row."""
    count = len(classes)
    side = min(max(0.55 * count, 4.0), 16.0)  # inches
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure = _new_figure(side + 2, side + 1)
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = min(10.0, 0.55 * 72 * side / count)  # points: what fits into a row
    names, style = _drawable(classes)
    axes.set_xticks(range(count), names, rotation=45, ha="right", va="top", fontsize=size, **style)
    axes.set_yticks(range(count), names, fontsize=size, **style)
    if count <= MOST_NUMBERED:
        for row, column in np.argwhere(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            number = f"{confusion[row, column]}"
            axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(picture, shrink=0.8, format="{x:.0%}", label="share of the true class")
    _save(figure, path)


def plot_predictions(
    images: np.ndarray, labels: np.ndarray, answers: np.ndarray, classes: Sequence[str], path: Path
) -> None:
    """Draws the first images as D2L does, the true class above the predicted; mistakes in red.

    The images are uint8, (N, H, W, C), C being 1 or 3; the answers are the predicted labels.
    """
    names, style = _drawable([_shortened(name) for name in classes])
    shown = np.arange(min(len(images), ROWS * COLUMNS))
    right = [labels[index] == answers[index] for index in shown]
    marks = ["" if fine else "✗ " for fine in right]  # for those who see no red
    titles = [f"{names[labels[i]]}\n{marks[i]}{names[answers[i]]}" for i in shown]
    heading = "first the true class, then the predicted"
    _plot_images(images[shown], titles, right, heading, path, style)


def plot_mistakes(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    path: Path,
) -> None:
    """Draws the mistakes of which the network was surest, by ``probabilities`` (N, classes)."""
    names, style = _drawable([_shortened(name) for name in classes])
    answers, confidences = probabilities.argmax(-1), probabilities.max(-1)
    mistakes = np.flatnonzero(answers != labels)
    mistakes = mistakes[np.argsort(-confidences[mistakes], kind="stable")][: ROWS * COLUMNS]
    titles = [f"{names[labels[i]]}\n{names[answers[i]]} {confidences[i]:.0%}" for i in mistakes]
    heading = "the surest mistakes: first the true class, then the predicted, with its probability"
    if not len(mistakes):
        heading = f"no mistakes in {len(images):,} images"
    _plot_images(images[mistakes], titles, [False] * len(mistakes), heading, path, style)


def _new_figure(width: float, height: float, layout: Any = "constrained") -> "Figure":
    from matplotlib.figure import Figure  # a third of a second, which no start need wait for

    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def _save(figure: "Figure", path: Path) -> None:
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png")


def _plot_images(
    images: np.ndarray,
    titles: list[str],
    right: Sequence[bool],
    heading: str,
    path: Path,
    style: dict[str, Any],
) -> None:
    columns = min(max(len(titles), FEWEST_COLUMNS), COLUMNS)
    rows = max(1, -(-len(titles) // columns))
    width, height = CELL_WIDTH * columns, HEADING + CELL_HEIGHT * rows
    figure = _new_figure(width, height, layout="none")
    figure.suptitle(heading, y=1 - HEADING / 2 / height, va="center", fontsize=11)
    # One frame for all, in inches: with one for each image Matplotlib took three times as long.
    axes = figure.add_axes((0, 0, 1, 1))
    for index, (image, title, fine) in enumerate(zip(images, titles, right, strict=True)):
        row, column = divmod(index, columns)
        middle, top = (column + 0.5) * CELL_WIDTH, HEADING + row * CELL_HEIGHT + TITLE
        tall, wide = (PICTURE * side / max(image.shape[:2]) for side in image.shape[:2])
        pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
        extent = (middle - wide / 2, middle + wide / 2, top + tall, top)
        axes.imshow(pixels, "gray", vmin=0, vmax=255, extent=extent)
        colour = "black" if fine else WRONG
        axes.text(
            middle, top - GAP, title, ha="center", va="bottom", fontsize=9, color=colour, **style
        )
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    _save(figure, path)


def _drawable(names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Names, and how to draw them: with the font that has most of the letters that the usual lacks.

    A name with a letter that neither has becomes its number: boxes would tell no two apart.
    """
    import matplotlib
    from matplotlib.font_manager import FontPath, FontProperties, findfont, fontManager, get_font

    def letters(path: FontPath) -> set[str]:
        return set(map(chr, get_font(path).get_charmap()))

    families = list(matplotlib.rcParams["font.family"])
    missing = set("".join(names)) - letters(findfont(FontProperties()))
    if missing:
        found = {
            font.name: has
            for font in fontManager.ttflist
            if (font.style, font.weight, font.stretch, font.size) == PLAIN
            and font.name != LAST_RESORT
            and (has := missing & letters(FontPath(font.fname, font.index)))
        }
        families += sorted(found, key=lambda name: -len(found[name]))[:1]
        missing = missing.difference(*(found[name] for name in families if name in found))
    drawable = [
        f"class {number}" if missing.intersection(name) else name
        for number, name in enumerate(names)
    ]
    return drawable, {"fontfamily": families, "parse_math": False}  # a name may hold dollars


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
