"""Masked sums against plain numpy; ties, NaN and masks."""

import jax.numpy as jnp
import numpy as np
import torch
from scipy import stats

from cifar_jax.metrics import (
    Metrics,
    calibration,
    measure,
    per_example_loss,
    predictions,
    softmax,
    wilson,
)


def test_sums_are_numpys(rng):
    logits, labels = rng.normal(size=(200, 10)).astype(np.float32), rng.integers(0, 10, 200)
    loss = per_example_loss(jnp.asarray(logits), jnp.asarray(labels))
    m = measure(jnp.asarray(logits), jnp.asarray(labels), loss)
    order = np.argsort(-logits, axis=1)
    hits = [(order[:, :k] == labels[:, None]).any(1).sum() for k in (1, 3, 5)]
    np.testing.assert_array_equal(m.hits, hits)
    confusion = np.zeros((10, 10))
    np.add.at(confusion, (labels, order[:, 0]), 1)
    np.testing.assert_array_equal(m.confusion, confusion)
    summary = m.summary()
    assert summary["accuracy"] == 100 * hits[0] / 200
    theirs = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    np.testing.assert_allclose(summary["loss"], theirs, rtol=1e-5)


def test_label_smoothing_is_torchs(rng):
    logits, labels = rng.normal(size=(50, 10)).astype(np.float32), rng.integers(0, 10, 50)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), label_smoothing=0.2, reduction="none"
    )
    np.testing.assert_allclose(
        per_example_loss(jnp.asarray(logits), jnp.asarray(labels), 0.2), theirs, rtol=1e-5
    )


def test_masked_images_do_not_count(rng):
    logits, labels = rng.normal(size=(64, 10)).astype(np.float32), rng.integers(0, 10, 64)
    logits[40:] = np.nan  # what stands in the masked places must not matter
    arrays = jnp.asarray(logits), jnp.asarray(labels)
    masked = measure(*arrays, per_example_loss(*arrays), weight=jnp.arange(64) < 40)
    first = jnp.asarray(logits[:40]), jnp.asarray(labels[:40])
    plain = measure(*first, per_example_loss(*first))
    for a, b in zip(
        (masked.count, masked.hits, masked.confusion), (plain.count, plain.hits, plain.confusion)
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(masked.loss, plain.loss, rtol=1e-6)


def test_nan_logits_are_misses_and_ties_go_to_the_smaller_class():
    labels = jnp.arange(10)
    nan = measure(jnp.full((10, 10), jnp.nan), labels, jnp.zeros(10))
    np.testing.assert_array_equal(nan.hits, [0, 0, 0])
    assert not nan.confusion.any()
    constant = measure(jnp.zeros((10, 10)), labels, jnp.zeros(10))
    np.testing.assert_array_equal(constant.hits, [1, 3, 5])  # chance, not a perfect score


def test_a_row_that_is_not_finite_has_no_prediction():
    logits, labels = np.array([[1, np.inf, 0], [0, 2, 1], [3, 1, 2]], np.float32), [1, 1, 1]
    m = measure(jnp.asarray(logits), jnp.array(labels), jnp.zeros(3))
    np.testing.assert_array_equal(m.confusion, [[0, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert float(m.hits[0]) == m.confusion.diagonal().sum() == 1
    np.testing.assert_array_equal(predictions(logits), [-1, 1, 0])


def test_sums_add_up_and_nothing_is_nothing(rng):
    logits, labels = (
        jnp.asarray(rng.normal(size=(30, 4)), jnp.float32),
        jnp.asarray(rng.integers(0, 4, 30)),
    )
    whole = measure(logits, labels, per_example_loss(logits, labels))
    parts = Metrics.zeros(4)
    for rows in (slice(0, 7), slice(7, 30)):
        parts = parts + measure(
            logits[rows], labels[rows], per_example_loss(logits[rows], labels[rows])
        )
    np.testing.assert_array_equal(parts.confusion, whole.confusion)
    assert parts.count == 30
    assert Metrics.zeros(4).summary() == {"loss": 0.0, "accuracy": 0.0, "top3": 0.0, "top5": 0.0}


def test_softmax_is_torchs(rng):
    logits = 50 * rng.normal(size=(20, 10))
    theirs = torch.softmax(torch.tensor(logits), 1)
    np.testing.assert_allclose(softmax(logits), theirs, rtol=1e-12)
    logits[3, 4] = np.inf
    assert np.isnan(softmax(logits)[3]).all() and np.isfinite(softmax(logits)[4]).all()


def test_calibration_by_hand():
    """Two images at 0.9, one of them right; one at 0.6, right: gaps 0.4 and 0.4, all of them."""
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [np.nan, np.nan]])
    found = calibration(p, np.array([0, 1, 1, 0]), bins=10)
    np.testing.assert_allclose(found["ece"], 100 * (2 * 0.4 + 0.4) / 3)
    np.testing.assert_allclose(found["brier"], 2 * (0.01 + 0.81 + 0.16) / 3)
    np.testing.assert_allclose([found["accuracy"], found["confidence"]], [200 / 3, 80.0])
    assert found["left_out"] == 1
    assert [b["count"] for b in found["bins"]] == [0, 0, 0, 0, 0, 1, 0, 0, 2, 0]
    np.testing.assert_allclose(found["bins"][8]["accuracy"], 50.0)
    assert found["bins"][0]["accuracy"] is None


def test_wilson_is_scipys():
    for hits in (0, 7, 9312, 10000):
        theirs = stats.binomtest(hits, 10000).proportion_ci(method="wilson")
        ours = wilson(100.0 * hits / 10000, 10000)
        np.testing.assert_allclose(ours, 100 * np.array(theirs), atol=1e-5)
