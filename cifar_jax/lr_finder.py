"""--mode=lr_find: the learning-rate range test (Smith 2015), as system 002 used it."""

import jax
import numpy as np

from cifar_jax import report
from cifar_jax import workdir as files
from cifar_jax.experiment import make_experiment
from cifar_jax.metrics import Metrics
from cifar_jax.steps import repeat

SMOOTHING = 0.9  # share of the old value in the running mean of the loss
SKIP_START, SKIP_END = 10, 5  # steps
DIVERGED = 4.0  # times the best smoothed loss: there the test ends


def find_learning_rate(config, workdir):
    """Train a fresh state for config.lr_find.steps steps at an exponentially growing rate.

    Writes lr_find.json and lr_find.png in `workdir`, touches nothing else, and returns the JSON:
    lr and loss of each step (nats an image), smoothed, and the suggestion, the learning rate at
    which the smoothed loss falls fastest.
    """
    path = files.writable(workdir)
    test = config.lr_find
    with config.unlocked():
        config.schedule = {
            "name": "exponential_ramp",
            "start_lr": test.start_lr,
            "peak_lr": test.end_lr,
        }
    exp = make_experiment(config, total_steps=test.steps)
    state = exp.init_state()
    zeros = jax.device_put(Metrics.zeros(len(exp.class_names)), exp.placement)
    programs, rates, losses = {}, [], []
    smoothed = [0.0]
    n, batch = exp.train.images.shape[0], config.batch_size
    for i in range(test.steps):
        size = min(batch, n - i % exp.steps_per_epoch * batch)
        if size not in programs:
            programs[size] = jax.jit(repeat(exp.step, 1, size), donate_argnums=0)
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
    found = {
        "lr": rates,
        "loss": losses,
        "smoothed": smoothed,
        "suggestion": steepest(rates, smoothed),
    }
    files.write_json(path / "lr_find.json", found)
    report.save({"lr_find": report.draw_lr_find(**found)}, path)
    suggestion = found["suggestion"]
    told = "none, too few steps" if suggestion is None else f"{suggestion:.3g} (steepest fall)"
    print(f"suggested learning rate: {told}")
    return found


def steepest(rates, smoothed):
    """The learning rate at which `smoothed` falls fastest against log(lr); None of too few steps.

    The first SKIP_START steps, where the running mean has no memory yet, and the last SKIP_END,
    where the loss already rises, do not count.
    """
    if len(rates) < SKIP_START + SKIP_END + 2:
        return None
    slope = np.gradient(np.asarray(smoothed), np.log(np.asarray(rates)))
    return float(rates[SKIP_START + int(np.argmin(slope[SKIP_START:-SKIP_END]))])
