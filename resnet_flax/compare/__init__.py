"""A port held against its PyTorch original: where the two part, and why."""

from resnet_flax.compare.compare import Comparison, Difference, Row, compare_with_torch
from resnet_flax.compare.diagnosis import Finding

__all__ = ["Comparison", "Difference", "Finding", "Row", "compare_with_torch"]
