"""Where the range test looks for its suggestions."""

import numpy as np
import pytest
from running import QUICK, finish

from cifar_jax.lr_finder import SKIP_END, SKIP_START, steepest, valley


def test_suggestions_of_a_known_curve():
    """A logistic fall around 1e-2 and a rise from 1 on: steepest at the middle of the fall; the
    valley's side ends at the rise, its middle half way back to where it began to fall."""
    rates = np.geomspace(1e-6, 10, 200)
    place = np.log10(rates)
    loss = 2.3 - 1.5 / (1 + np.exp(-4 * (place + 2))) + np.where(place > 0, 5 * place**2, 0)
    assert steepest(rates, loss) == pytest.approx(1e-2, rel=0.1)
    end = int(np.argmin(loss))
    assert valley(rates, loss) == pytest.approx(rates[(SKIP_START + end) // 2], rel=0.1)
    # noise on the way down does not cut the valley in two, and steps need not be neighbours
    noisy = loss + 0.003 * np.random.default_rng(0).normal(size=200)
    assert 1e-4 < valley(rates, noisy) < 1e-1
    # against the rate itself the steepest fall lies where the rate is small
    linear = np.linspace(1e-3, 1, 200)
    assert steepest(linear, np.exp(-10 * linear), np.array) == linear[SKIP_START]


@pytest.mark.long
def test_a_loss_that_hardly_falls_is_told(program, tmp_path):
    ramp = ("--config.lr_find.end_lr=2e-6", "--config.lr_find.steps=20")
    _, err = finish(program(*QUICK, "--mode=lr_find", *ramp, f"--workdir={tmp_path}"))
    assert "the loss fell by less than 5%" in err and "these say little" in err


def test_too_few_steps_suggest_nothing():
    few = np.geomspace(1e-3, 1, SKIP_START + SKIP_END + 1)
    assert steepest(few, few) is None and valley(few, few) is None
