"""How far a run has come: what a checkpoint holds beside the arrays."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import jax.numpy as jnp

from resnet_flax.training.metrics import Metrics


class EpochResult(NamedTuple):
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: from 1.
        loss: training cross-entropy, accumulated over the epoch in train mode.
        train_acc: training accuracy, likewise.
        test_acc: accuracy over the test set after the epoch, in eval mode.
        examples_per_sec: training images per second of training time, evaluation left out.
        seconds: of the whole epoch, without what its steps waited for the compiler.
    """

    epoch: int
    loss: float
    train_acc: float
    test_acc: float
    examples_per_sec: float
    seconds: float


@dataclass(frozen=True)
class Position:
    """A place in a run.

    Attributes:
        results: of the epochs that were trained and tested.
        steps: finished steps of the epoch under way.
        metrics: the sums over these steps.
        training_seconds: that these steps took, without waiting for the compiler.
    """

    results: list[EpochResult] = field(default_factory=list)
    steps: int = 0
    metrics: Metrics = field(default_factory=Metrics.empty)
    training_seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """Number of the epoch under way, from 1."""
        return len(self.results) + 1

    def as_json(self) -> dict[str, Any]:
        """For a JSON file; float32 values are exact in it."""
        metrics = self.metrics
        return {
            "results": [result._asdict() for result in self.results],
            "steps": self.steps,
            "loss_sum": float(metrics.loss_sum),
            "correct": int(metrics.correct),
            "count": int(metrics.count),
            "training_seconds": self.training_seconds,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `as_json`."""
        return cls(
            results=[EpochResult(**row) for row in fields["results"]],
            steps=int(fields["steps"]),
            metrics=Metrics(
                jnp.asarray(fields["loss_sum"], float),
                jnp.int32(fields["correct"]),
                jnp.int32(fields["count"]),
            ),
            training_seconds=float(fields["training_seconds"]),
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)
