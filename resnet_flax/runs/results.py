"""What a finished run leaves behind for others: weights, pictures, and a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_flax.data import Dataset, LazyImages
from resnet_flax.inference.predict import compute_logits
from resnet_flax.inference.pretrained import Network, save_weights
from resnet_flax.inference.scores import score, softmax
from resnet_flax.runs.config import TrainConfig
from resnet_flax.runs.model_card import MARK, model_card
from resnet_flax.runs.plotting import plot_confusion, plot_curves, plot_mistakes, plot_predictions
from resnet_flax.runs.run_folder import CARD, CONFUSION, CURVES, MISTAKES, PREDICTIONS
from resnet_flax.training.position import EpochResult


def write_results(
    folder: Path,
    config: TrainConfig,
    network: Network,
    variables: Any,
    test_data: Dataset,
    results: Sequence[EpochResult],
) -> None:
    """Writes ``model.safetensors``, the pictures and the card ``README.md`` into a run's folder.

    Raises:
        InputError: when the weights or a picture cannot be written.
        OSError: when the card cannot.
    """
    # On the host: of several processes the first alone is here, and computes with its own devices.
    variables = jax.tree.map(np.asarray, variables)
    save_weights(folder, network, variables)
    plot_curves(results, folder / CURVES)

    images, labels, classes = test_data.images, test_data.labels, network.classes
    logits = compute_logits(network, variables, images)
    if isinstance(images, LazyImages) and images.broken:
        kept = np.setdiff1d(np.arange(len(images)), [*images.broken])
        images, labels, logits = images.select(kept), labels[kept], logits[kept]
    scores, probabilities = score(logits, labels), softmax(logits)
    plot_confusion(scores.confusion, classes, folder / CONFUSION)
    plot_predictions(images, labels, logits.argmax(-1), classes, folder / PREDICTIONS)
    plot_mistakes(images, labels, probabilities, classes, folder / MISTAKES)
    card = folder / CARD
    if not card.exists() or MARK in card.read_text("utf-8"):
        card.write_text(model_card(config, network, results, scores), "utf-8")
