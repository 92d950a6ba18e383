"""What each of the four scripts is given, and how what it did is checked.

``python -m benchmarks.ease`` makes the files; each script is run with their folder as its argument,
and with an interpreter that need not have PyTorch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(sys.argv[1])
WEIGHTS = FOLDER / "resnet18.safetensors"  # torchvision's keys, 3 channels, 1000 classes
PHOTO, PICTURES = FOLDER / "photo.png", FOLDER / "pictures"  # of the tasks with pretrained weights
EXPECTED = np.load(FOLDER / "expected.npz")  # what PyTorch makes of `colour` with these weights
PARAMETERS = 11_175_370  # of ResNet-18 without biases, for 1 channel and 10 classes

random = np.random.default_rng(0)
grey_bytes = random.integers(0, 256, (8, 64, 64, 1), dtype=np.uint8)
grey = grey_bytes / np.float32(255)  # NHWC
if "colour" in EXPECTED:
    colour = EXPECTED["colour"]
    colour_bytes = np.rint(colour * 255).astype(np.uint8)
labels = np.arange(8) % 4


def check_built(parameters: int) -> None:
    """Task 1: the number of parameters that are trained."""
    assert parameters == PARAMETERS, parameters
    print("1 ok")


def check_step(loss: float, mean_before: Any, mean_after: Any) -> None:
    """Task 2: a loss, and a BN whose running mean has moved."""
    assert np.isfinite(loss), loss
    assert not np.array_equal(mean_before, mean_after)
    print("2 ok")


def check_loaded(logits: Any) -> None:
    """Task 3: PyTorch's logits."""
    _check_close(logits, EXPECTED["logits"])
    print("3 ok")


def check_maps(maps: Sequence[Any]) -> None:
    """Task 4: PyTorch's four feature maps, NHWC."""
    for stage, found in enumerate(maps, start=1):
        _check_close(found, EXPECTED[f"stage{stage}"])
    assert len(maps) == 4
    print("4 ok")


def check_tuned(losses: Sequence[float], before: Sequence[Any], after: Sequence[Any]) -> None:
    """Task 5: the loss falls; neither the trunk's weights nor its statistics change."""
    assert losses[-1] < losses[0], losses
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    print("5 ok")


def check_reloaded(before: Any, after: Any) -> None:
    """Task 6: the reloaded network gives the same logits, for ten classes."""
    assert np.shape(before) == (8, 10)
    np.testing.assert_array_equal(before, after)
    print("6 ok")


def check_classified(shares: Any) -> None:
    """Pretrained, task 1: PyTorch's three largest probabilities."""
    _check_close(shares, EXPECTED["shares"])
    print("1 ok")


def check_features(features: Any) -> None:
    """Pretrained, task 2: PyTorch's pooled features."""
    _check_close(features, EXPECTED["features"])
    print("2 ok")


def check_fine_tuned(losses: Sequence[float], classes: int) -> None:
    """Pretrained, task 3: two epochs with a new head."""
    assert len(losses) == classes == 2
    assert np.isfinite(losses).all(), losses
    print("3 ok")


def _check_close(found: Any, expected: np.ndarray) -> None:
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error < 1e-4, f"off by {error:.1e} of the largest value"
