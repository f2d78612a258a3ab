"""Learning-rate schedules and the optimizer chain; what torch.optim has, too, is equal to it.

A schedule maps a step (0, 1, ...) to a number. The chain clips, applies the moments and the
learning rate; L2 weight decay comes before the moments (sgd, adam) or after them (adamw, muon).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cifar_jax import InputError

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


@dataclasses.dataclass(frozen=True)
class Schedules:
    """What changes over a run: learning rate; maybe momentum (Adam's beta1) and weight decay.

    `restarts` are the steps at which the optimizer's moments start again from zero; `freeze` holds
    the step from which a layer is trained no more, by the layer's name.
    """

    learning_rate: Schedule
    momentum: Schedule | None = None
    weight_decay: Schedule | None = None
    restarts: tuple[int, ...] = ()
    freeze: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def frozen(self, step):
        """Names of the layers that are not trained in training step `step` (0, 1, ...)."""
        return tuple(sorted(layer for layer, first in self.freeze.items() if step >= first))


def constant(value):
    """The same value at every step."""
    return lambda step: jnp.full(jnp.shape(step), value, float)


def linear_ramp(start, end, steps):
    """From start at step 0 to end at step `steps` - 1 in equal differences."""
    return lambda step: (
        start + (end - start) * jnp.minimum(jnp.asarray(step, float) / max(steps - 1, 1), 1.0)
    )


def exponential_ramp(start, end, steps):
    """From start at step 0 to end at step `steps` - 1 in equal ratios."""
    return lambda step: (
        start * (end / start) ** jnp.minimum(jnp.asarray(step, float) / max(steps - 1, 1), 1.0)
    )


def piecewise_constant(values, boundaries):
    """values[i] from step boundaries[i - 1] on."""
    values, boundaries = tuple(values), tuple(boundaries)

    def schedule(step):
        zero = jnp.zeros(jnp.shape(step), int)
        return jnp.array(values)[sum((jnp.asarray(step) >= b for b in boundaries), zero)]

    return schedule


def _up_and_down(low, peak, end, total_steps, pct_start, anneal):
    """low -> peak until step pct_start * total_steps - 1, then peak -> end at the last step.

    A table made in float64: a formula in float32 would be off by two units in the last place.
    """
    blend = {"cosine": lambda t: np.sin(np.pi / 2 * t) ** 2, "linear": lambda t: t}
    if anneal not in blend:
        raise InputError(f"unknown annealing {anneal!r}; choose cosine or linear")
    turn = pct_start * total_steps - 1.0
    if turn <= 0.0 or turn >= total_steps - 1:
        raise InputError(
            f"pct_start {pct_start} leaves no step before or after the peak of {total_steps} steps"
        )
    steps = np.arange(total_steps)
    rising = low + (peak - low) * blend[anneal](steps / turn)
    falling = end + (peak - end) * blend[anneal](
        (total_steps - 1 - steps) / (total_steps - 1 - turn)
    )
    table = np.where(steps <= turn, rising, falling)
    return lambda step: jnp.asarray(table, float)[jnp.minimum(step, total_steps - 1)]


def one_cycle(
    peak_lr, total_steps, *, pct_start=0.3, div_factor=25.0, final_div_factor=1e4, anneal="cosine"
):
    """The learning rate of torch.optim.lr_scheduler.OneCycleLR (two phases).

    From peak_lr / div_factor up to peak_lr at step pct_start * total_steps - 1 (a fraction of a
    step is kept, as in PyTorch), then down to peak_lr / div_factor / final_div_factor at step
    total_steps - 1.
    """
    low = peak_lr / div_factor
    return _up_and_down(low, peak_lr, low / final_div_factor, total_steps, pct_start, anneal)


def one_cycle_momentum(base, maximum, total_steps, *, pct_start=0.3, anneal="cosine"):
    """The momentum (Adam's beta1) of OneCycleLR with cycle_momentum: maximum -> base -> maximum."""
    return _up_and_down(maximum, base, maximum, total_steps, pct_start, anneal)


def triangle(peak_lr, total_steps, *, pct_start, start_factor, end_factor):
    """Linear from start_factor * peak_lr at step 0 to peak_lr at step int(pct_start * total_steps),
    then to end_factor * peak_lr at step total_steps, one after the last (cifar10-airbench)."""
    turn = int(pct_start * total_steps)
    if not 0 < turn < total_steps:
        raise InputError(
            f"pct_start {pct_start} leaves no step before or after the peak of {total_steps} steps"
        )
    factors = [start_factor, 1.0, end_factor]
    table = peak_lr * np.interp(np.arange(total_steps), [0, turn, total_steps], factors)
    return lambda step: jnp.asarray(table, float)[jnp.minimum(step, total_steps - 1)]


def make_schedules(*, halve_at=(), **kwargs):
    """Schedules of a config section (_schedules_by_name); at each step of `halve_at` the learning
    rate falls to half of what it would be, for good."""
    schedules = _schedules_by_name(**kwargs)
    if not halve_at:
        return schedules
    halves = piecewise_constant([0.5**i for i in range(len(halve_at) + 1)], sorted(halve_at))
    rate = schedules.learning_rate
    return dataclasses.replace(schedules, learning_rate=lambda step: rate(step) * halves(step))


def _schedules_by_name(*, name, total_steps, steps_per_epoch, **kwargs):
    """Schedules by name.

    'constant' (peak_lr); 'one_cycle' (peak_lr, pct_start, div_factor, final_div_factor, anneal,
    momentum: (base, maximum) or None); 'phases' (epochs, peak_lr, weight_decay: a value for each
    phase; fresh moments between them); 'triangle' (peak_lr, pct_start, start_factor, end_factor,
    freeze: {layer: epochs it trains}); 'linear_ramp' and 'exponential_ramp' (start_lr, peak_lr).
    Raises InputError for an unknown name.
    """
    ramps = {"linear_ramp": linear_ramp, "exponential_ramp": exponential_ramp}
    if name not in ramps:
        kwargs.pop("start_lr", None)  # base.py has it, whatever the schedule
    if name == "constant":
        return Schedules(constant(kwargs["peak_lr"]))
    if name == "one_cycle":
        momentum = kwargs.pop("momentum", None)
        shape = {key: kwargs[key] for key in ("pct_start", "anneal") if key in kwargs}
        return Schedules(
            one_cycle(total_steps=total_steps, **kwargs),
            momentum and one_cycle_momentum(*momentum, total_steps, **shape),
        )
    if name == "triangle":
        freeze = kwargs.pop("freeze", {}).items()
        return Schedules(
            triangle(total_steps=total_steps, **kwargs),
            freeze={layer: round(epochs * steps_per_epoch) for layer, epochs in freeze},
        )
    if name == "phases":
        if len({len(kwargs[key]) for key in ("epochs", "peak_lr", "weight_decay")}) != 1:
            raise InputError(
                "schedule 'phases' needs as many peak_lr and weight_decay values as epochs"
            )
        ends = [
            sum(kwargs["epochs"][: i + 1]) * steps_per_epoch
            for i in range(len(kwargs["epochs"]) - 1)
        ]
        return Schedules(
            piecewise_constant(kwargs["peak_lr"], ends),
            weight_decay=piecewise_constant(kwargs["weight_decay"], ends),
            restarts=tuple(ends),
        )
    if name in ramps:
        return Schedules(ramps[name](kwargs["start_lr"], kwargs["peak_lr"], total_steps))
    choices = ["constant", "one_cycle", "phases", "triangle", *ramps]
    raise InputError(f"unknown schedule {name!r}; choose one of {', '.join(choices)}")


def restart(inner, steps):
    """`inner` with its state set back to the initial one before each of the given steps."""

    def init(params):
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates, state, params=None):
        count, inner_state = state
        now = jnp.isin(count, jnp.array(steps))
        fresh = inner.init(updates)
        inner_state = jax.tree.map(lambda new, old: jnp.where(now, new, old), fresh, inner_state)
        updates, inner_state = inner.update(updates, inner_state, params)
        return updates, (count + 1, inner_state)

    return optax.GradientTransformation(init, update)


def freeze(layers):
    """No update for the layers {name: step} from that step on; InputError for an unknown one."""

    def init(params):
        unknown = [layer for layer in layers if layer not in params]
        if unknown:
            raise InputError(f"schedule.freeze: the model has no layer {unknown[0]!r}")
        return jnp.zeros((), jnp.int32)

    def update(updates, count, params=None):
        still = {
            layer: jax.tree.map(
                lambda u, first=first: jnp.where(count < first, u, 0), updates[layer]
            )
            for layer, first in layers.items()
        }
        return {**updates, **still}, count + 1

    return optax.GradientTransformation(init, update)


def scale_norm_biases(factor):
    """Multiply the gradients of BatchNorm's biases: of layers named bn, bn1 or ..._bn2."""

    def scale(path, gradient):
        layer, variable = path[-2].key, path[-1].key
        is_norm = re.search(r"(^|_)bn\d*$", layer) and variable == "bias"
        return gradient * factor if is_norm else gradient

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def make_lookahead(*, total_steps, every, decay, power):
    """Lookahead over a whole run: lookahead(slow, fast, step) -> (slow, fast), after step 1, 2, ...

    Every `every` steps slow <- s * slow + (1 - s) * fast and fast <- slow, where
    s = decay ** every * (step / total_steps) ** power; at the end fast <- slow (cifar10-airbench).
    """

    def lookahead(slow, fast, step):
        share = decay**every * (jnp.asarray(step, float) / total_steps) ** power
        now = step % every == 0

        def blend(slow, fast):
            return jnp.where(now, slow + (1 - share).astype(fast.dtype) * (fast - slow), slow)

        slow = jax.tree.map(blend, slow, fast)
        taken = now | (step == total_steps)
        return slow, jax.tree.map(lambda s, f: jnp.where(taken, s, f), slow, fast)

    return lookahead


def muon(b1, nesterov, b2, eps):
    """Muon for convolutions, each kernel as the matrix [H * W * in, out]; Adam for what else there
    is. Scaled to Adam's usual size of updates, so that one learning rate serves both
    (arXiv 2502.16982)."""

    def kernels(params):
        matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
        return jax.tree.map(lambda x: matrix if x.ndim == 4 else None, params)

    return optax.contrib.muon(
        -1.0,  # the sign alone: rate and decay follow in the chain
        beta=b1,
        nesterov=nesterov,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=kernels,
    )


# name: (momentum or b1, nesterov, b2, eps) -> what becomes of a gradient
MOMENTS = {
    "sgd": lambda momentum, nesterov, b2, eps: optax.trace(momentum, nesterov),
    "adam": lambda b1, nesterov, b2, eps: optax.scale_by_adam(b1, b2, eps),
    "adamw": lambda b1, nesterov, b2, eps: optax.scale_by_adam(b1, b2, eps),
    "muon": muon,
}
DECOUPLED = ("adamw", "muon")  # decay acts on the update; the others' on the gradient (L2)


def make_optimizer(
    *,
    name,
    schedule,
    clip_value=None,
    clip_norm=None,
    weight_decay=0.0,
    momentum=0.9,
    nesterov=False,
    norm_bias_factor=1.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    """The optax chain of one of MOMENTS.

    `schedule` is a Schedules or a plain learning-rate schedule; where it has a momentum or
    weight-decay schedule that one takes the place of `momentum`/`b1` or `weight_decay`. Clipping
    acts on the loss gradient alone, before L2: `clip_value` element by element, `clip_norm` by
    global norm. `norm_bias_factor` (sgd): how many times larger the learning rate of BatchNorm's
    biases is; their decay a step is the others'. Raises InputError for an unknown name.
    """
    if not isinstance(schedule, Schedules):
        schedule = Schedules(schedule)
    if name not in MOMENTS:
        raise InputError(f"unknown optimizer {name!r}; choose one of {', '.join(MOMENTS)}")
    if norm_bias_factor != 1.0 and name != "sgd":
        raise InputError(f"norm_bias_factor is for sgd; {name} does not see a gradient's scale")
    cycled = schedule.momentum or constant(momentum if name == "sgd" else b1)

    def chain(learning_rate, momentum, weight_decay):
        moments = MOMENTS[name](momentum, nesterov, b2, eps)
        if schedule.restarts:
            moments = restart(moments, schedule.restarts)
        decay = optax.add_decayed_weights(weight_decay)
        if norm_bias_factor != 1.0:
            decay = optax.chain(scale_norm_biases(norm_bias_factor), decay)
        rate = optax.scale_by_learning_rate(learning_rate)
        if schedule.freeze:
            rate = optax.chain(rate, freeze(schedule.freeze))
        order = (moments, decay) if name in DECOUPLED else (decay, moments)
        return optax.chain(
            optax.identity() if clip_value is None else optax.clip(clip_value),
            optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
            *order,
            rate,
        )

    return optax.inject_hyperparams(chain)(
        learning_rate=schedule.learning_rate,
        momentum=cycled,
        weight_decay=schedule.weight_decay or constant(weight_decay),
    )
