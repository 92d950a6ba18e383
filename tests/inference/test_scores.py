"""Scores against definitions written out."""

import math

import numpy as np
import pytest

from resnet_flax.inference.scores import calibration_error, score, softmax

NO, YES = [4.0, 0.0, 0.0], [0.0, 4.0, 0.0]


def test_scores_of_a_small_case():
    scores = score(np.array([NO, NO, YES, YES]), np.array([0, 1, 1, 1]))
    assert scores.accuracy == 0.75
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert scores.precision == (1 / 2, 1.0, None)
    assert scores.recall == (1.0, 2 / 3, None)
    sure = math.exp(4) / (math.exp(4) + 2)
    assert scores.loss == pytest.approx(-(3 * math.log(sure) + math.log((1 - sure) / 2)) / 4)
    assert scores.calibration_error == pytest.approx(abs(sure - 0.75))


def guos_equation(confidences, right):
    """Equation 3 of Guo et al., 2017, with their M = 15, word for word."""
    error = 0.0
    for m in range(1, 16):
        members = [i for i, c in enumerate(confidences) if (m - 1) / 15 < c <= m / 15]
        if members:
            accuracy = sum(bool(right[i]) for i in members) / len(members)
            confidence = sum(confidences[i] for i in members) / len(members)
            error += len(members) / len(confidences) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("seed", range(5))
def test_the_calibration_error_is_guos(seed):
    random = np.random.default_rng(seed)
    confidences = random.uniform(0.1, 1, 1000)
    right = random.uniform(size=1000) < confidences**2
    expected = guos_equation(confidences, right)
    assert calibration_error(confidences, right) == pytest.approx(expected)
    assert expected > 0.05


def test_the_calibration_error_at_the_ends():
    assert calibration_error(np.ones(4), np.ones(4, bool)) == 0
    assert calibration_error(np.ones(4), np.zeros(4, bool)) == 1
    assert calibration_error(np.array([1 / 3]), np.array([True])) == pytest.approx(2 / 3)


def test_large_logits_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        scores = score(np.array([[1e4, -1e4], [1e4, -1e4]], np.float32), np.array([0, 1]))
    assert scores.loss == 1e4
    np.testing.assert_array_equal(softmax(np.array([1e4, -1e4])), [1, 0])
