"""--mode=search: learning rate and weight decay by short runs of proposals, as system 001 did.

The proposals are Optuna's, `at_once` of them are replicas of one run (seeds.py). A proposal follows
from the seed, its number and the results before its round, so that a search that is killed ends as
if it had not been.
"""

import contextlib
import dataclasses
import math

import numpy as np
import optuna

from cifar_jax import InputError, report
from cifar_jax import workdir as files
from cifar_jax.experiment import environment, make_experiment
from cifar_jax.seeds import VARIED, make_replicas, train_replicas
from cifar_jax.train import Interruption

SAMPLERS = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
STUDY = "search"
DONE, ASKED = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING


def search(config, workdir):
    """Train config.search.trials proposals, resuming if `workdir` holds this search; returns
    search.json's content.

    A proposal's accuracy, by which they are ranked, is the mean over its epochs (as in system 001)
    and seeds on the validation images; the test images are not looked at. Writes the study
    (search.db), a run a round (round-*/), search.json and search.png. status: 'done' or
    'interrupted'. Raises InputError for bad input.
    """
    ranges = check(config)
    with contextlib.ExitStack() as held:
        interruption = held.enter_context(Interruption())
        path = held.enter_context(files.only_writer(workdir))
        files.open_workdir(path, config.to_dict(), environment(), "search")
        study = open_study(path / "search.db")
        size, exp, provenance, status = config.search.at_once, None, None, "done"
        for first in range(0, config.search.trials, size):
            numbers = range(first, first + size)
            trials = [propose(study, config, ranges, number) for number in numbers]
            if all(trial.state == DONE for trial in trials):
                continue
            if interruption.requested:
                status = "interrupted"
                break
            exp = exp or make_experiment(short_run(config), shard_batches=False)
            provenance = exp.provenance
            print(f"proposals {first} to {numbers[-1]} of {config.search.trials}", flush=True)
            folder = path / f"round-{first // size}"
            found = train_replicas(of_round(exp, ranges, trials), folder, test=False)
            if found["status"] == "interrupted":
                status = "interrupted"
                break
            for trial, measured in zip(trials, results(found, trials), strict=True):
                if trial.state != DONE:  # killed between two of them
                    tell(study, trial, measured)
        return finish(path, config, study, ranges, status, provenance)
