"""Whether runs differ, or only seem to: intervals and tests of their figures, with scipy."""

import numpy as np
from scipy import stats


def interval(values):
    """n, mean, sd and 95 % interval (Student's t) of a figure over runs; of one, only a mean."""
    x = np.asarray(values, float)
    n, mean = len(x), float(x.mean())
    if n < 2:
        return {"n": n, "mean": mean, "sd": None, "interval": None}
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / n**0.5
    return {"n": n, "mean": mean, "sd": sd, "interval": [mean - half, mean + half]}


def told(found, unit):
    """`interval` in words."""
    text = f"{found['mean']:.2f} {unit}, n {found['n']}"
    if found["interval"]:
        low, high = found["interval"]
        text += f", sd {found['sd']:.2f}, 95 % interval {low:.2f} to {high:.2f}"
    return text


def _rounding(*values):
    """Deviations up to this come from rounding `values`, not from the runs."""
    return 1e-9 * max(float(np.abs(x).max()) for x in values)


def paired(ours, theirs):
    """`interval` of ours - theirs, pair by pair, and the p_value of the paired t-test.

    None where it has no meaning: of one pair, or where every pair differs by the same.
    """
    difference = interval(np.subtract(ours, theirs))
    p_value = None
    if difference["sd"] is not None and difference["sd"] > _rounding(ours, theirs):
        t = difference["mean"] / (difference["sd"] / difference["n"] ** 0.5)
        p_value = float(2 * stats.t.sf(abs(t), difference["n"] - 1))
    return {**difference, "p_value": p_value}


def welch(ours, theirs):
    """Mean and 95 % interval of ours - theirs over two independent groups, and Welch's p_value.

    Both None where a group has one value only, or neither varies.
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    found = {"mean": float(a.mean() - b.mean()), "interval": None, "p_value": None}
    if min(len(a), len(b)) > 1 and a.std() + b.std() > _rounding(a, b):
        test = stats.ttest_ind(a, b, equal_var=False)
        found["interval"] = [float(x) for x in test.confidence_interval(0.95)]
        found["p_value"] = float(test.pvalue)
    return found


def mcnemar(ours, theirs):
    """Two networks on the same images, `ours` and `theirs` [N] saying which each gets right.

    Mean and 95 % interval of the difference of their accuracies, in points; how many images only
    one of them gets right; p_value: McNemar's exact test.
    """
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    differing = only_ours + only_theirs
    points = interval(100.0 * (ours.astype(float) - theirs))
    return {
        "mean": points["mean"],
        "interval": points["interval"],
        "only_ours": only_ours,
        "only_theirs": only_theirs,
        "p_value": float(stats.binomtest(only_ours, differing).pvalue) if differing else 1.0,
    }


def holm(p_values):
    """The p-values of several tests, adjusted so that all of them together err in 5 % (Holm)."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result.tolist()
