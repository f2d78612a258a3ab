"""The runs of --mode=seeds: which seeds, learning rates and weight decays config asks for."""

import dataclasses
import math

import numpy as np

from cifar_jax import InputError
from cifar_jax.experiment import check_seeds
from cifar_jax.optim import constant, make_schedules

STRATEGIES = ("sequence", "map", "vmap")
VARIED = ("lr", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Replica:
    """One run: `lr` and `weight_decay` as config.replicas has them, None for the recipe's own;
    `fields` {dotted name: value}, by which the config of this run by itself differs."""

    seed: int
    lr: float | None
    weight_decay: float | None
    fields: dict

    @property
    def setting(self):
        return self.lr, self.weight_decay


def make_replicas(config):
    """[Replica] of config.seeds and config.replicas, setting by setting; InputError if they cannot
    be."""
    if config.seeds < 1:
        raise InputError(f"config.seeds must be at least 1, not {config.seeds}")
    check_seeds(config.seed, config.seeds)
    if config.on_nonfinite != "stop" or config.profile or config.log.tensorboard:
        raise InputError(
            "on_nonfinite=rollback, profile and log.tensorboard are for one run, not for many"
        )
    strategy, choices = config.replicas.strategy, ("auto", *STRATEGIES)
    if strategy not in choices:
        raise InputError(
            f"unknown replicas.strategy {strategy!r}; choose one of {', '.join(choices)}"
        )
    values = {name: config.replicas[name] for name in VARIED}
    count = max(1, *map(len, values.values()))
    for name, given in values.items():
        for value in given:
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not number or value < 0 or (name == "lr" and not value):
                raise InputError(f"config.replicas.{name} cannot be {value!r}")
        if len(given) not in (0, 1, count):
            raise InputError(f"config.replicas.{name} has {len(given)} values, the other {count}")
    columns = [
        (*map(float, given),) * (count if len(given) == 1 else 1) for given in values.values()
    ]
    settings = [*zip(*(column or (None,) * count for column in columns), strict=True)]
    if len({*settings}) < count:
        raise InputError("config.replicas has the same pair of lr and weight_decay twice")
    return [
        Replica(seed, *setting, {"seed": seed, **setting_fields(config, *setting)})
        for setting in settings
        for seed in range(config.seed, config.seed + config.seeds)
    ]


def setting_fields(config, lr, weight_decay):
    """{dotted name: value} of a run by itself at this setting."""
    fields = {}
    if lr is not None:
        fields["schedule.peak_lr"] = _in_proportion(config.schedule.peak_lr, lr)
    if weight_decay is not None:
        section = "schedule" if "weight_decay" in config.schedule else "optim"
        before = config[section].weight_decay
        fields[f"{section}.weight_decay"] = _in_proportion(before, weight_decay)
    if config.data.validation and config.data.split_seed is None:
        fields["data.split_seed"] = config.seed  # they share one split
    return fields


def _in_proportion(before, first):
    """`first` in place of a number; of a value for each phase, all change as the first does."""
    if not isinstance(before, (tuple, list)):
        return first
    return (first, *(first * value / before[0] if before[0] else first for value in before[1:]))


def make_rates(exp, settings):
    """{'learning_rate', 'weight_decay': float32 [settings, steps]}, what runs by themselves have.

    Tables, for the schedules themselves are made in float64.
    """
    steps = np.arange(exp.total_steps)
    rates = {"learning_rate": [], "weight_decay": []}
    for setting in settings:
        config = exp.config.copy_and_resolve_references()
        with config.unlocked(), config.ignore_type():
            config.update_from_flattened_dict(setting_fields(config, *setting))
        spans = {"total_steps": exp.total_steps, "steps_per_epoch": exp.steps_per_epoch}
        schedules = make_schedules(**config.schedule, **spans)
        decay = schedules.weight_decay or constant(config.optim.weight_decay)
        for name, schedule in (("learning_rate", schedules.learning_rate), ("weight_decay", decay)):
            rates[name].append(np.asarray(schedule(steps), np.float32))
    return {name: np.stack(rows) for name, rows in rates.items()}
