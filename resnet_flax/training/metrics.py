"""Loss and accuracy as sums over samples."""

from typing import Self

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
