"""--mode=search: learning rate and weight decay by short runs of proposals, as system 001 did.

The proposals are Optuna's; `at_once` of them make a round, replicas of one run (seeds.py). A round
follows from the seed and the rounds before it, so that a search that was killed ends as if it had
not been.
"""

import contextlib
import dataclasses
import itertools

import numpy as np
import optuna
import sqlalchemy

from cifar_jax import InputError, first_line, report
from cifar_jax import workdir as files
from cifar_jax.experiment import make_experiment
from cifar_jax.interruption import Interruption
from cifar_jax.provenance import environment
from cifar_jax.replicas import VARIED, make_replicas
from cifar_jax.seeds import train_replicas

SAMPLERS = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}


def search(config, workdir):
    """Train config.search.trials proposals, resuming if `workdir` holds this search; returns
    search.json's content.

    They are ranked by accuracy on the validation images, the mean over epochs and seeds; the test
    images, of which system 001 took the mean, are not looked at. Writes search.db (Optuna's study),
    a run a round (round-*), search.json and search.png. status: 'done' or 'interrupted'. Raises
    InputError for bad input.
    """
    ranges = make_ranges(config)
    size, status = config.search.at_once, "done"
    with contextlib.ExitStack() as held:
        path = held.enter_context(files.only_writer(workdir))
        files.check_workdir(path, config.to_dict(), "search")  # before the data are loaded
        exp = make_experiment(config, shard_batches=False)
        interruption = held.enter_context(Interruption())
        files.open_workdir(path, config.to_dict(), environment(), exp.about_data, "search")
        study = open_study(path / "search.db")
        for first in range(0, config.search.trials, size):
            if len(study.trials) >= first + size:
                continue
            if interruption.requested:
                status = "interrupted"
                break
            print(f"proposals {first} to {first + size - 1}:", flush=True)
            proposals = propose(study.trials[:first], ranges, config)
            part = dataclasses.replace(exp, config=round_config(config, proposals))
            folder = path / f"round-{first // size}"
            found = train_replicas(part, folder, interruption, test=False)
            if found["status"] == "interrupted":
                status = "interrupted"
                break
            epochs = -(-part.end_step // part.steps_per_epoch)
            measured = measure(found["replicas"], config.seeds, epochs)
            known = len(study.trials) - first  # of this round, where it was killed among these
            for proposal, figures in [*zip(proposals, measured, strict=True)][known:]:
                add_trial(study, proposal, ranges, figures)
        return finish(path, config, study, ranges, status)


def make_ranges(config):
    """{'lr' and 'weight_decay', or one of them: Optuna's distribution}; InputError if the search
    cannot be."""
    settings = config.search
    if not config.data.validation:
        raise InputError("a search needs held-out images: --config.data.validation=5000")
    if settings.sampler not in SAMPLERS:
        choices = ", ".join(SAMPLERS)
        raise InputError(f"unknown search.sampler {settings.sampler!r}; choose one of {choices}")
    if settings.at_once < 1 or settings.trials < 1 or settings.trials % settings.at_once:
        raise InputError(
            f"config.search.trials {settings.trials} is no multiple of search.at_once "
            f"{settings.at_once}"
        )
    if not settings.epochs > 0:
        raise InputError(f"config.search.epochs must be more than 0, not {settings.epochs}")
    ranges = {}
    for name in VARIED:
        if not settings[name]:
            continue
        try:
            low, high = map(float, settings[name])
            ranges[name] = optuna.distributions.FloatDistribution(low, high, log=True)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"config.search.{name} must be the lowest and the highest value, above 0, not "
                f"{settings[name]!r}"
            ) from error
    if any(config.replicas[name] for name in VARIED):
        raise InputError(
            "a search sets config.replicas.lr and weight_decay itself; give config.search.lr and "
            "weight_decay their ranges"
        )
    if not ranges:
        raise InputError("config.search has neither a range of lr nor of weight_decay")
    make_replicas(config)
    return ranges


def open_study(path):
    """Optuna's study in the file `path`, made if need be; InputError if it cannot be read."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=str(sqlalchemy.URL.create("sqlite", database=str(path))),
            study_name="search",
            direction="maximize",
            load_if_exists=True,
        )
        study.get_trials()  # opening reads only some of it
        return study
    except Exception as error:  # SQLite's, SQLAlchemy's and Optuna's own
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def add_trial(study, proposal, ranges, figures):
    """Keep what `measure` says of a proposal; InputError if that cannot be written."""
    trial = optuna.trial.create_trial(
        params=proposal, distributions=ranges, value=figures["accuracy"], user_attrs=figures
    )
    try:
        study.add_trial(trial)
    except Exception as error:  # SQLite's, SQLAlchemy's and Optuna's own
        raise InputError(f"search.db cannot be written: {first_line(error)}") from error


def propose(trials, ranges, config):
    """The next round's proposals [{name: value}] after `trials`, always the same."""
    seed = np.random.SeedSequence([config.seed, len(trials)]).generate_state(1)[0]
    sampler = SAMPLERS[config.search.sampler](seed=int(seed))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(trials)
    return [study.ask(ranges).params for _ in range(config.search.at_once)]


def round_config(config, proposals):
    """The config of the run whose replicas are `proposals`."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.stop_after = float(config.search.epochs)
        for name in VARIED:
            config.replicas[name] = tuple(p[name] for p in proposals if name in p)
    return config


def measure(replicas, seeds, epochs):
    """[{'accuracy', 'eval_accuracy' [seeds][epochs], 'diverged'}] of each proposal.

    An epoch that a diverged run did not reach counts as no image right.
    """
    found = []
    for i in range(0, len(replicas), seeds):
        group = replicas[i : i + seeds]
        curves = [replica["eval_accuracy"] for replica in group]
        total = sum(itertools.chain.from_iterable(curves))
        found.append(
            {
                "accuracy": total / (epochs * seeds),
                "eval_accuracy": curves,
                "diverged": sum(replica["status"] == "diverged" for replica in group),
            }
        )
    return found


def finish(path, config, study, ranges, status):
    """Write search.png and search.json, print the table."""
    trials = [{"number": t.number, **t.params, **t.user_attrs} for t in study.trials]
    ranked = sorted(trials, key=lambda trial: -trial["accuracy"])
    here = environment()
    here["versions"]["optuna"] = optuna.__version__
    result = {
        "status": status,
        "model": config.model.name,
        "search": config.search.to_dict(),
        "seeds": config.seeds,
        "dataset": (files.read_json(path / "round-0" / "seeds.json") or {}).get("dataset"),
        "best": ranked[0] if ranked else None,
        "trials": ranked,
        **here,
    }
    if ranked:
        spans = {name: (span.low, span.high) for name, span in ranges.items()}
        figure = report.draw_search(ranked, spans, "accuracy")
        report.save({"search": figure}, path)
        print(f"{'rank':>4} {'number':>6} " + " ".join(f"{n:>12}" for n in ranges) + "  accuracy")
    for rank, trial in enumerate(ranked, start=1):
        values = " ".join(f"{trial[name]:12.4g}" for name in ranges)
        lost = f"  {trial['diverged']} diverged" if trial["diverged"] else ""
        print(f"{rank:>4} {trial['number']:>6} {values}  {trial['accuracy']:6.2f} %{lost}")
    files.write_json(path / files.RESULTS["search"], result)
    return result
