"""Loss and accuracy as sums over samples, and the figures of an epoch and of a run."""

from typing import NamedTuple, Self

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


class Metrics(struct.PyTreeNode):
    """Sums over samples, so that batches of different sizes weigh by their samples.

    Attributes:
        loss_sum: float32 scalar (float64 where JAX is told so), cross-entropy in nats.
        correct: int32 scalar.
        count: int32 scalar, number of samples.
    """

    loss_sum: Float[Array, ""]
    correct: Int[Array, ""]
    count: Int[Array, ""]

    @classmethod
    def empty(cls) -> Self:
        """The sums over no samples."""
        return cls(jnp.zeros(()), jnp.int32(0), jnp.int32(0))

    @property
    def loss(self) -> float:
        """Mean cross-entropy; waits for the device."""
        return float(self.loss_sum) / max(1, int(self.count))

    @property
    def accuracy(self) -> float:
        """Share of correct predictions; waits for the device."""
        return int(self.correct) / max(1, int(self.count))

    def add(
        self,
        logits: Float[Array, "N classes"],
        losses: Float[Array, " N"],
        labels: Int[Array, " N"],
        weights: Float[Array, " N"],
    ) -> Self:
        """Adds a batch; ``weights`` (N,) is 1 for a sample that counts and 0 for padding."""
        correct = (logits.argmax(-1) == labels) & (weights > 0)
        return self.replace(
            loss_sum=self.loss_sum + (losses * weights).sum(),
            correct=self.correct + correct.sum(dtype=jnp.int32),
            count=self.count + (weights > 0).sum(dtype=jnp.int32),
        )


class EpochResult(NamedTuple):
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: from 1.
        loss: training cross-entropy, accumulated over the epoch in train mode.
        train_acc: training accuracy, likewise.
        test_acc: accuracy over the test set after the epoch, in eval mode.
        examples_per_sec: training images per second of training time, evaluation left out.
        seconds: wall time of the whole epoch.
    """

    epoch: int
    loss: float
    train_acc: float
    test_acc: float
    examples_per_sec: float
    seconds: float


def final_report(results: list[EpochResult], device: str) -> str:
    """D2L's two closing lines; the rate is over the training time of all epochs."""
    last = results[-1]
    rate = len(results) / sum(1 / result.examples_per_sec for result in results)
    return (
        f"loss {last.loss:.3f}, train acc {last.train_acc:.3f}, test acc {last.test_acc:.3f}\n"
        f"{rate:.1f} examples/sec on {device}"
    )
