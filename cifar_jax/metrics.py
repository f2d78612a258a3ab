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
    finite: jax.Array  # how many of them have a finite loss
    loss: jax.Array
    hits: jax.Array  # [3]: top-1, top-3, top-5
    confusion: jax.Array  # [C, C]: true, predicted; without the rows that are not finite

    @classmethod
    def zeros(cls, num_classes):
        """The sum over no image, on the host."""
        shapes = (), (), (), (len(TOP),), (num_classes, num_classes)
        return cls(*(np.zeros(shape, np.float32) for shape in shapes))

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
    finite = jnp.isfinite(logits).all(-1)
    rank = jnp.where(finite, rank, num_classes)
    hits = (rank[:, None] < jnp.array(TOP)[None]) * weight[:, None]
    true = jax.nn.one_hot(labels, num_classes) * weight[:, None]
    predicted = jax.nn.one_hot(jnp.where(finite, logits.argmax(-1), -1), num_classes)
    return Metrics(
        weight.sum(),
        (jnp.isfinite(loss) * weight).sum(),  # no matrix product: a GPU's would round what it sums
        jnp.where(weight > 0, loss * weight, 0.0).sum(),
        hits.sum(0),
        true.T @ predicted,
    )


def predictions(logits):
    """The class of the largest of logits [N, C], on the host; -1 where a row is not finite."""
    logits = np.asarray(logits)
    return np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1)


def softmax(logits):
    """Probabilities [N, C] of logits on the host, as float64; NaN where a row is not finite."""
    logits = np.asarray(logits, np.float64)
    finite = np.isfinite(logits).all(-1, keepdims=True)
    logits = np.where(finite, logits, 0.0)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return np.where(finite, exponentials / exponentials.sum(-1, keepdims=True), np.nan)


def calibration(probabilities, labels, bins=15):
    """How far confidence (the largest of `probabilities` [N, C]) is from accuracy, in percent.

    ece: the expected calibration error (Guo et al. 2017), the mean distance of the two over `bins`
    equal bins, weighted by their images; brier: the mean squared distance to the true class's unit
    vector. bins: low, high, and of the images in it count, accuracy, confidence (None of none).
    Rows with a NaN are left out and counted.
    """
    kept = ~np.isnan(probabilities).any(-1)
    p, labels = probabilities[kept], np.asarray(labels)[kept]
    confidence = p.max(-1, initial=0.0)
    right = p.argmax(-1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts, rights, sums = (
        np.bincount(place, weights, bins) for weights in (None, right, confidence)
    )
    total = max(len(p), 1)
    target = np.arange(p.shape[1]) == labels[:, None]
    return {
        "ece": 100.0 * float(np.abs(rights - sums).sum()) / total,
        "accuracy": 100.0 * float(right.sum()) / total,
        "confidence": 100.0 * float(confidence.sum()) / total,
        "brier": float(((p - target) ** 2).sum()) / total,
        "left_out": int((~kept).sum()),
        "bins": [
            {
                "low": 100.0 * i / bins,
                "high": 100.0 * (i + 1) / bins,
                "count": int(count),
                "accuracy": 100.0 * float(rights[i] / count) if count else None,
                "confidence": 100.0 * float(sums[i] / count) if count else None,
            }
            for i, count in enumerate(counts)
        ],
    }


def wilson(share, n):
    """Wilson's 95 % interval, in percent, of a `share` in percent of `n` images."""
    z, p, n = 1.959964, share / 100.0, max(n, 1)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [100.0 * (middle - half), 100.0 * (middle + half)]
