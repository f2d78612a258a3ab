"""The tests of differences against scipy's own and against hand-made counts."""

import numpy as np
import pytest
from scipy import stats

from cifar_jax.significance import holm, interval, mcnemar, paired, welch


def test_interval_is_students_t():
    """Of 1, 2, 3, 4: t(0.975, 3) = 3.18245 (table); standard error sqrt(5/3) / 2."""
    figure = interval([1, 2, 3, 4])
    assert (figure["n"], figure["mean"]) == (4, 2.5)
    np.testing.assert_allclose(figure["sd"], (5 / 3) ** 0.5)
    half = 3.18245 * (5 / 3) ** 0.5 / 2
    np.testing.assert_allclose(figure["interval"], [2.5 - half, 2.5 + half], rtol=1e-5)
    assert interval([94.0]) == {"n": 1, "mean": 94.0, "sd": None, "interval": None}


def test_paired_is_scipys(rng):
    ours, theirs = rng.normal(60, 1, (2, 6))
    reference = stats.ttest_rel(ours, theirs)
    found = paired(ours, theirs)
    assert found["p_value"] == pytest.approx(reference.pvalue)
    assert found["interval"] == pytest.approx([*reference.confidence_interval()])


def test_what_never_varies_is_not_tested():
    assert paired([2.0, 3.0], [1.0, 2.0])["p_value"] is None
    assert paired([2.0], [1.0]) == {**interval([1.0]), "p_value": None}
    assert welch([2.0], [1.0, 3.0]) == {"mean": 0.0, "interval": None, "p_value": None}
    assert welch([2.0, 2.0], [1.0, 1.0])["p_value"] is None
    # and what varies by rounding alone
    found = paired([93.35, 93.45, 93.65], [93.25, 93.35, 93.55])
    assert found["sd"] > 0 and found["p_value"] is None
    assert welch([93.41] * 3, [93.4] * 3)["p_value"] is None


def test_welch_by_hand():
    """Of 1, 2, 3 and 2, 4, 6, 8: -3 over sqrt(1/3 + 20/12), its degrees by Satterthwaite."""
    variances = 1 / 3, 20 / 3 / 4
    error = sum(variances) ** 0.5
    degrees = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    found = welch([1, 2, 3], [2, 4, 6, 8])
    assert found["mean"] == -3
    assert found["p_value"] == pytest.approx(2 * stats.t.sf(3 / error, degrees))
    half = stats.t.ppf(0.975, degrees) * error
    assert found["interval"] == pytest.approx([-3 - half, -3 + half])


def test_mcnemar_counts_what_only_one_gets_right():
    """8 against 2 of 10 fair coins: 2 * (1 + 10 + 45) / 1024 = 0.109375."""
    ours = np.array([1] * 8 + [0] * 2 + [1] * 60 + [0] * 30)
    theirs = np.array([0] * 8 + [1] * 2 + [1] * 60 + [0] * 30)
    found = mcnemar(ours, theirs)
    assert (found["only_ours"], found["only_theirs"]) == (8, 2)
    assert found["mean"] == pytest.approx(6.0)
    assert found["p_value"] == pytest.approx(0.109375)
    assert found["interval"][0] < 0 < found["interval"][1]
    assert mcnemar(ours, ours)["p_value"] == 1.0


def test_holm_by_hand():
    """Smallest times 3, next times 2, largest times 1, and never falling."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
