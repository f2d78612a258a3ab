"""--mode=lr_find: the learning-rate range test (Smith 2015), as system 002 had one.

The running mean is unbiased and the test ends as fastai's; that system's was another package's.
"""

import sys

import jax
import numpy as np

from cifar_jax import InputError, meant, report
from cifar_jax import workdir as files
from cifar_jax.experiment import make_experiment
from cifar_jax.steps import repeat

RAMPS = {"exponential": "exponential_ramp", "linear": "linear_ramp"}
SMOOTHING = 0.9  # share of the old value in the running mean of the loss
SKIP_START, SKIP_END = 10, 5  # steps
FALL = 0.05  # of the smoothed loss; with less there was nothing to learn from
DIVERGED = 4.0  # times the best smoothed loss: there the test ends


def find_learning_rate(config, workdir):
    """Train a fresh state for config.lr_find.steps steps at a growing rate.

    Writes lr_find.json and lr_find.png in `workdir`, touches nothing else (a run may lie there),
    and returns the JSON: range; lr and loss of each step (nats an image); smoothed, the running
    mean of the loss; and the suggestions, see `steepest` and `valley`. It ends where the loss has
    diverged. Raises InputError for a range that is none.
    """
    path = files.writable(workdir)
    test = config.lr_find
    if test.range not in RAMPS:
        raise InputError(
            f"unknown lr_find.range {test.range!r}; choose exponential or linear"
            + meant(test.range, RAMPS)
        )
    if not 0 < test.start_lr < test.end_lr or test.steps < 1:
        raise InputError(
            "config.lr_find needs 0 < start_lr < end_lr and at least one step, not "
            f"{test.start_lr:g}, {test.end_lr:g} and {test.steps}"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if "weight_decay" in config.schedule:  # of phases: what the first has
            config.optim.weight_decay = config.schedule.weight_decay[0]
        config.schedule = {
            "name": RAMPS[test.range],
            "start_lr": test.start_lr,
            "peak_lr": test.end_lr,
        }
    exp = make_experiment(config, total_steps=test.steps)
    state = exp.init_state()
    zeros = exp.no_metrics()
    programs, rates, losses = {}, [], []
    smoothed = [0.0]
    for i in range(test.steps):
        size = exp.images_at(i + 1) - exp.images_at(i)
        if size not in programs:
            programs[size] = jax.jit(repeat(exp.step, exp.order, 1, size), donate_argnums=0)
        state, metrics = programs[size](state, zeros, exp.train)
        loss = metrics.summary()["loss"]
        if not np.isfinite(loss):
            break
        rates.append(float(exp.schedules.learning_rate(i)))
        losses.append(loss)
        running = SMOOTHING * smoothed[-1] * (1 - SMOOTHING**i) + (1 - SMOOTHING) * loss
        smoothed.append(running / (1 - SMOOTHING ** (i + 1)))
        if smoothed[-1] > DIVERGED * min(smoothed[1:]):
            break
    smoothed = smoothed[1:]
    suggestions = {
        "steepest": steepest(rates, smoothed, np.log if test.range == "exponential" else np.array),
        "valley": valley(rates, smoothed),
    }
    found = {
        "range": test.range,
        "lr": rates,
        "loss": losses,
        "smoothed": smoothed,
        "suggestions": suggestions,
    }
    files.write_json(path / "lr_find.json", found)
    report.save({"lr_find": report.draw_lr_find(**found)}, path)
    told = [f"{name} {rate:.3g}" for name, rate in suggestions.items() if rate is not None]
    few = f"none, {len(rates)} steps are too few"
    print(f"suggested learning rates: {', '.join(told) or few}")
    if told and min(smoothed) > (1 - FALL) * smoothed[SKIP_START]:
        print(
            f"the loss fell by less than {FALL:.0%}, from {smoothed[SKIP_START]:.4g} to "
            f"{min(smoothed):.4g}: these say little; take more steps (config.lr_find.steps) or a "
            "larger end_lr",
            file=sys.stderr,
        )
    return found


def steepest(rates, smoothed, scale=np.log):
    """The learning rate at which `smoothed` falls fastest against scale(lr); None of too few steps.

    The first SKIP_START steps, where the running mean has no memory yet, and the last SKIP_END,
    where the loss already rises, do not count.
    """
    if len(rates) < SKIP_START + SKIP_END + 2:
        return None
    slope = np.gradient(np.asarray(smoothed), scale(np.asarray(rates)))
    return float(rates[SKIP_START + int(np.argmin(slope[SKIP_START:-SKIP_END]))])


def valley(rates, smoothed):
    """The learning rate in the middle of the valley side: of the longest falling subsequence of
    `smoothed`, whose steps need not be neighbours, the half of its length before its end (as
    fastai's suggestion of that name). The same steps as in `steepest` do not count."""
    if len(rates) < SKIP_START + SKIP_END + 2:
        return None
    losses = np.asarray(smoothed)[SKIP_START:-SKIP_END]
    length = np.ones(len(losses), int)  # of the longest that ends at each step
    for i in range(1, len(losses)):
        length[i] += max(length[:i][losses[:i] > losses[i]], default=0)
    end = int(np.argmax(length))
    return float(rates[SKIP_START + end - int(length[end]) // 2])
