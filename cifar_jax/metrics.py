"""Sums over images that are exact at any batch size, and the figures made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

TOP = (1, 3, 5)


class Metrics(struct.PyTreeNode):
    """Sums over images."""

    count: jax.Array
    loss: jax.Array
    hits: jax.Array  # [3]: top-1, top-3, top-5
    confusion: jax.Array  # [C, C]: true, predicted

    @classmethod
    def zeros(cls, num_classes):
        """The sum over no image."""
        return cls(
            jnp.zeros(()), jnp.zeros(()), jnp.zeros(len(TOP)), jnp.zeros((num_classes, num_classes))
        )

    def __add__(self, other):
        return jax.tree.map(jnp.add, self, other)

    def summary(self):
        """Means, fetched as floats: loss (nats an image), accuracy, top3, top5 (percent)."""
        m = jax.device_get(self)
        top1, top3, top5 = (100.0 * float(h) / max(float(m.count), 1.0) for h in m.hits)
        return {
            "loss": float(m.loss) / max(float(m.count), 1.0),
            "accuracy": top1,
            "top3": top3,
            "top5": top5,
        }


def per_example_loss(logits, labels, label_smoothing=0.0):
    """Cross-entropy [B] of logits or log-probabilities [B, C], with uniform label smoothing."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        uniform = -jax.nn.log_softmax(logits).mean(-1)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
    return loss


def measure(logits, labels, loss, weight=None):
    """Metrics of a batch: logits [B, C], labels, loss and weight [B] (0 leaves an image out).

    A label's rank counts the classes with a larger logit, ties broken by the smaller class number;
    a row with a non-finite logit is a miss.
    """
    num_classes = logits.shape[-1]
    weight = jnp.ones(labels.shape) if weight is None else weight.astype(jnp.float32)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(num_classes)[None] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(-1)
    rank = jnp.where(jnp.isfinite(logits).all(-1), rank, num_classes)
    hits = (rank[:, None] < jnp.array(TOP)[None]) * weight[:, None]
    true = jax.nn.one_hot(labels, num_classes) * weight[:, None]
    predicted = jax.nn.one_hot(logits.argmax(-1), num_classes)
    return Metrics(
        weight.sum(), jnp.where(weight > 0, loss, 0.0) @ weight, hits.sum(0), true.T @ predicted
    )
