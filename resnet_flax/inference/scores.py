"""How good a classifier is: accuracy, loss, precision and recall, calibration."""

from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """What a classifier reached on a test set.

    Precision is the share of right answers among those that named a class, None where none did;
    recall the share of a class's images that were recognised, None for a class without images.
    """

    accuracy: float
    loss: float  # mean cross-entropy, in nats
    calibration_error: float
    precision: tuple[float | None, ...]
    recall: tuple[float | None, ...]
    confusion: np.ndarray  # int64 (classes, classes): the row's class taken for the column's


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Compares answers, logits (N, classes) with N at least 1, with the true labels."""
    answers = logits.argmax(-1)
    confusion = np.zeros((logits.shape[-1],) * 2, np.int64)
    np.add.at(confusion, (labels, answers), 1)
    return Scores(
        accuracy=float((answers == labels).mean()),
        loss=float(-log_softmax(logits)[np.arange(len(labels)), labels].mean()),
        calibration_error=calibration_error(softmax(logits).max(-1), answers == labels),
        precision=_shares(confusion.diagonal(), confusion.sum(0)),
        recall=_shares(confusion.diagonal(), confusion.sum(1)),
        confusion=confusion,
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities, float64, over the last axis."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, over the last axis."""
    return np.exp(log_softmax(logits))


def calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error: how far confidence and accuracy are apart.

    The answers are put into bins of equal width by their confidence, their probability; each bin's
    difference of mean confidence and accuracy counts by its share of the answers.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017 (arXiv:1706.04599), eq. 3.
    """
    # A bin is open on the left, closed on the right.
    bin_of = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    differences = np.bincount(bin_of, confidences - right, minlength=bins)
    return float(np.abs(differences).sum() / len(confidences))


def as_text(value: float | None) -> str:
    """``0.912``, or ``-`` for what is not defined."""
    return "-" if value is None else f"{value:.3f}"


def _shares(hits: np.ndarray, totals: np.ndarray) -> tuple[float | None, ...]:
    pairs = zip(hits.tolist(), totals.tolist(), strict=True)
    return tuple(hit / total if total else None for hit, total in pairs)
