"""--mode=seeds: one recipe from many seeds, at several learning rates and weight decays, at once.

Each such run is a replica. Their states are stacked, axis 0 is the replica, and every device trains
its share of them by itself: a replica sees what it would see alone, whatever the others do.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax import InputError, sharding
from cifar_jax import workdir as files
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.evaluate import figures, figures_of, per_class
from cifar_jax.experiment import make_experiment
from cifar_jax.interruption import Interruption
from cifar_jax.metrics import Metrics
from cifar_jax.optim import make_optimizer
from cifar_jax.provenance import environment
from cifar_jax.replicas import VARIED, make_rates, make_replicas
from cifar_jax.significance import interval, paired, told
from cifar_jax.steps import repeat
from cifar_jax.train import Run, all_finite

# By backend. On one CPU device sequence and map took the same CPU time within what such a
# measurement tells and vmap more (results/seeds/); sequence is bit for bit the run by itself.
AUTO = {"cpu": "sequence"}
UNMEASURED = "map"  # elsewhere; convolutions under vmap: https://github.com/jax-ml/jax/issues/26568


def train_seeds(config, workdir):
    """Train the replicas of `config`, resuming if `workdir` holds them; returns seeds.json's
    content.

    status as of train.train_and_evaluate, 'diverged' if every replica did. Raises InputError for
    bad input.
    """
    result = files.finished_result(workdir, config.to_dict(), Replicas.mode)
    if result:
        print(f"{workdir} holds these runs, finished")
    else:
        make_replicas(config)
        path = files.absolute(workdir)
        files.check_workdir(path, config.to_dict(), Replicas.mode)  # before the data are loaded
        exp = make_experiment(config, shard_batches=False)
        with Interruption() as interruption:
            result = train_replicas(exp, workdir, interruption)
    try:
        for line in summary_lines(result["settings"]):
            print(line)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{workdir}/seeds.json is not the result of runs; delete it") from error
    return result


def summary_lines(settings):
    """What seeds.json's `settings` say, in words."""
    for setting in settings:
        named = [f"{name} {setting[name]:.4g}" for name in VARIED if setting[name] is not None]
        if setting["test"]:
            yield f"{', '.join(named) or 'all seeds'}: test accuracy {told(setting['test'], '%')}"
        if setting["difference"]:
            yield f"  more than the first: {told(setting['difference'], 'points')}"


def train_replicas(exp, workdir, interruption, test=True):
    """train_seeds with an Experiment (of unsharded batches) and an entered Interruption at
    hand; `test`: measure the best checkpoint of each replica on the test set."""
    config = exp.config
    replicas = make_replicas(config)
    with contextlib.ExitStack() as held:
        path = held.enter_context(files.only_writer(workdir))
        files.open_workdir(path, config.to_dict(), environment(), exp.about_data, Replicas.mode)
        checkpoints = held.enter_context(Checkpoints(path / "checkpoints", exp.placement))
        run = Replicas(exp, path, checkpoints, replicas, test)
        run.restore()
        return run.finish(run.train(interruption))


def make_call(exp, call):
    """steps.repeat of one replica: run((row, state, sums), (rates, dataset)) -> (state, sums), its
    rates being that row of them (see make_rates)."""

    def run(mine, shared):
        (row, state, sums), (rates, dataset) = mine, shared
        schedules = {name: lambda step, t=table: t[row, step] for name, table in rates.items()}
        schedules = dataclasses.replace(exp.schedules, **schedules)
        tx = make_optimizer(**exp.config.optim, schedule=schedules)
        return repeat(exp.make_step(tx), exp.order, *call)(state, sums, dataset)

    return run


def over_replicas(strategy, one):
    """`one(mine, shared)` of one replica as a function of trees whose axis 0 is the replica."""

    def many(mine, shared):
        if strategy == "vmap":
            return jax.vmap(lambda x: one(x, shared))(mine)
        if strategy == "map":
            return lax.map(lambda x: one(x, shared), mine)
        found = one(jax.tree.map(lambda x: x[0], mine), shared)
        return jax.tree.map(lambda x: x[None], found)

    return many


class Replicas(Run):
    """A Run of many replicas.

    `state`, `metrics` and `best` (the weights of each replica's lowest evaluation loss) are tuples
    of chunks, trees whose axis 0 is the replica, split over the devices; a call trains one chunk
    after the other. With the strategy 'sequence' a chunk is a replica a device, else there is one
    chunk of all. Places left over train the last replica once more. In sequence on one device a
    chunk has no such axis: with it XLA would round otherwise than in the same run by itself.
    """

    mode = "seeds"

    def __init__(self, exp, path, checkpoints, replicas, test):
        self.replicas, self.test, self.evaluations = replicas, test, {}
        backend, strategy = jax.default_backend(), exp.config.replicas.strategy
        self.strategy = AUTO.get(backend, UNMEASURED) if strategy == "auto" else strategy
        self.mesh = exp.placement.mesh
        n, size = len(replicas), self.mesh.size
        self.alone = self.strategy == "sequence" and size == 1
        if self.strategy != "sequence":
            size *= -(-n // size)
        places = np.arange(-(-n // size) * size).reshape(-1, *(() if self.alone else (size,)))
        self.chunks = np.minimum(places, n - 1)  # the replicas of each
        self.split = exp.placement if self.alone else sharding.split(self.mesh)
        self.diverged = np.zeros(n, np.int32)  # at which step; 0: not
        settings = [*dict.fromkeys(replica.setting for replica in replicas)]
        rates = make_rates(exp, settings)
        self.rows = np.array([settings.index(replica.setting) for replica in replicas])
        self.learning_rates = rates["learning_rate"]
        self.rates = sharding.put(rates, exp.placement)
        self.row_chunks = self.put(self.rows)
        super().__init__(exp, path, checkpoints)
        self.finite = jax.jit(all_finite if self.alone else jax.vmap(all_finite))
        self.best = tuple(jax.tree.map(jnp.copy, chunk.variables) for chunk in self.state)

    def put(self, tree):
        """The chunks of arrays [replicas, ...]."""
        pieces = (jax.tree.map(lambda x, i=rows: x[i], tree) for rows in self.chunks)
        return tuple(jax.device_put(piece, self.split) for piece in pieces)

    def join(self, chunks, where=jnp):
        """The arrays [replicas, ...] of chunks."""
        n, glue = len(self.replicas), where.stack if self.alone else where.concatenate
        return jax.tree.map(lambda *parts: glue(parts)[:n], *chunks)

    def fetch(self, chunks):
        """The same on the host."""
        return self.join(jax.device_get(chunks), np)

    def spread(self, one):
        """`one(mine, shared)` of one replica as a function of a chunk."""
        if self.alone:
            return one
        return sharding.spread(over_replicas(self.strategy, one), self.mesh)

    def begin(self):
        def stack(rows):
            states = [self.exp.init_state(self.replicas[i].seed) for i in rows.flat]
            if self.alone:
                return states[0]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            return jax.device_put(stacked, self.split)

        zeros = Metrics.zeros(len(self.exp.class_names))
        zeros = jax.tree.map(lambda x: np.zeros((len(self.replicas), *x.shape), x.dtype), zeros)
        return tuple(map(stack, self.chunks)), self.put(zeros)

    @property
    def step(self):
        return int(jax.device_get(self.state[0].step).ravel()[0])

    def saved(self):
        state, sums, best = self.joined(self.state, self.metrics, self.best)
        diverged = jax.device_put(self.diverged, self.exp.placement)
        return state, {"sums": sums, "best": best, "diverged": diverged}

    @functools.cached_property
    def joined(self):
        """What `saved` joins as one program: an array at a time each would be a program that all
        devices must meet in, and many under way at once can lock each other out."""

        def join_all(state, *more):
            state = self.join(state)
            return state.replace(step=state.step[0]), *map(self.join, more)

        return jax.jit(join_all, out_shardings=self.exp.placement)

    def take(self, state, beside):
        steps = jnp.full(len(self.replicas), state.step)
        self.state = self.put(state.replace(step=steps))
        self.metrics, self.best = self.put(beside["sums"]), self.put(beside["best"])
        self.diverged = np.array(beside["diverged"])

    def return_to_best(self):
        chunks = zip(self.state, self.best, strict=True)
        self.state = tuple(
            state.with_variables(jax.tree.map(jnp.copy, best)) for state, best in chunks
        )

    def compile_call(self, call):
        spread = self.spread(make_call(self.exp, call))

        def run(state, sums, row, rates, dataset):
            return spread((row, state, sums), (rates, dataset))

        program = jax.jit(run, donate_argnums=0)
        first = (self.state[0], self.metrics[0], self.row_chunks[0])
        program = program.lower(*first, self.rates, self.exp.train).compile()

        def run_chunks(state, sums, dataset):
            chunks = zip(state, sums, self.row_chunks, strict=True)
            found = [program(*chunk, self.rates, dataset) for chunk in chunks]
            return tuple(zip(*found, strict=True))

        return run_chunks

    def total(self, metrics):
        sums = self.fetch(metrics)
        alive = np.isfinite(sums.loss)
        return jax.tree.map(lambda x: x[alive if alive.any() else ...].sum(0), sums)

    def find_divergence(self, step):
        """As Run's, of each replica; None while one goes on."""
        sums = self.fetch(self.metrics)
        ends = self.exp.ends_epoch(step) or step == self.exp.end_step
        if not ends and np.isfinite(sums.loss).any():
            return None  # wherever it is interrupted, it looks at the same steps
        finite = self.fetch(tuple(map(self.finite, self.state)))
        for i, replica in enumerate(self.replicas):
            if self.diverged[i] or (np.isfinite(sums.loss[i]) and finite[i]):
                continue
            good = int(sums.finite[i]) // self.exp.config.batch_size
            lost = not np.isfinite(sums.loss[i])
            self.diverged[i] = self.epoch_begin(step) + good + 1 if lost else step
            named = ", ".join(f"{name} {value}" for name, value in replica.fields.items())
            print(f"replica {i} diverged at step {self.diverged[i]} ({named})", file=sys.stderr)
        return int(self.diverged.max()) if self.diverged.all() else None

    def measure(self, states, dataset, tta="none"):
        """Metrics of each replica on `dataset`, on the host."""
        key = len(dataset), tta
        if key not in self.evaluations:
            start = time.perf_counter()
            program = jax.jit(self.spread(self.exp.evaluations[tta]))
            self.evaluations[key] = program.lower(states[0], dataset).compile()
            self.compile_seconds += time.perf_counter() - start
        program = self.evaluations[key]
        metrics = self.fetch(tuple(program(state, dataset)[0] for state in states))
        return [jax.tree.map(lambda x, i=i: x[i], metrics) for i in range(len(self.replicas))]

    def records_of(self, i):
        """Of replica i, one of each epoch that it ended."""
        return [record for record in self.records if record["replica"] == i]

    def best_record(self, i):
        """The record of replica i with the lowest evaluation loss, of those that are due; None
        without a finite one."""
        found = [
            r for r in self.records_of(i) if self.due(r["step"]) and _is_finite(r["eval_loss"])
        ]
        return min(found, key=lambda record: record["eval_loss"], default=None)

    def end_epoch(self, step):
        train = self.fetch(self.metrics)
        compiled = self.compile_seconds
        start = time.perf_counter()
        measured = self.measure(self.state, self.eval_set)
        seconds = time.perf_counter() - start - (self.compile_seconds - compiled)
        better, records = np.zeros(len(self.replicas), bool), []
        for i, replica in enumerate(self.replicas):
            if self.diverged[i]:
                continue
            summaries = jax.tree.map(lambda x, i=i: x[i], train).summary(), measured[i].summary()
            rate = float(self.learning_rates[self.rows[i], step - 1])
            record = self.record(step, rate, *summaries, seconds)
            record = {"replica": i, "seed": replica.seed, **record}
            best, loss = self.best_record(i), record["eval_loss"]
            better[i] = (
                self.due(step) and _is_finite(loss) and (best is None or loss < best["eval_loss"])
            )
            records.append(record)
        self.records += records
        chunks = zip(self.put(better), self.state, self.best, strict=True)
        self.best = tuple(_chosen(mask, state.variables, best) for mask, state, best in chunks)
        files.append_metrics(self.path / "metrics.jsonl", *records)
        self.metrics, self.train_seconds = self.no_metrics, 0.0
        losses, accuracies = ([r[key] for r in records] for key in ("train_loss", "eval_accuracy"))
        speed = sum(r["images_per_second"] for r in records)
        print(
            f"epoch {self.exp.epochs_at(step):3g}/{self.exp.config.epochs:g}  "
            f"train {np.mean(losses):.4f}  eval {told(interval(accuracies), '%')}  "
            f"{speed:,.0f} images/s  {records[0]['seconds']:.1f} s",
            flush=True,
        )
        self.save_when_due(step)

    def finish(self, status):
        """Measure the best of each replica on the test set and write seeds.json last."""
        exp, config, step = self.exp, self.exp.config, self.step
        start, compiled = time.perf_counter(), self.compile_seconds
        self.checkpoints.wait()
        tests, now = [{}] * len(self.replicas), None
        if status != "interrupted":
            if not exp.ends_epoch(step):
                now = self.measure(self.state, self.eval_set)
            if self.test:
                tests = self.measure_best(now)
        self.finish_seconds = time.perf_counter() - start - (self.compile_seconds - compiled)
        replicas = []
        for i, replica in enumerate(self.replicas):
            records, best = self.records_of(i), self.best_record(i)
            last = figures_of(records[-1]) if records else None
            evaluated = [record["eval_accuracy"] for record in records]
            if now and not self.diverged[i]:
                last = {"epoch": exp.epochs_at(step), **figures(now[i].summary())}
                evaluated.append(last["accuracy"])
            end = {"status": status}
            if self.diverged[i]:
                end = {"status": "diverged", "diverged_at": int(self.diverged[i])}
            replicas.append(
                {
                    "replica": i,
                    "seed": replica.seed,
                    **dict(zip(VARIED, replica.setting, strict=True)),
                    "fields": replica.fields,
                    **end,
                    "epochs": exp.epochs_at(step),
                    "best": figures_of(best) if best else last,
                    "last": last,
                    "eval_accuracy": evaluated,
                    **tests[i],
                }
            )
        epochs = [*{record["step"]: record for record in self.records}.values()]
        seconds = self.seconds(epochs)
        images = len(replicas) * exp.images_at(step)
        result = {
            "status": status,
            "model": config.model.name,
            "params": exp.count_params(),
            "dataset": exp.provenance,
            "epochs": exp.epochs_at(step),
            "epochs_planned": config.epochs,
            "steps": step,
            "strategy": self.strategy,
            "images_per_second": images / (seconds["train"] or math.inf),
            "seconds": seconds,
            "settings": summarize(replicas),
            "replicas": replicas,
            **environment(),
        }
        files.write_json(self.path / files.RESULTS[self.mode], result)
        return result

    def measure_best(self, now):
        """[{'test', 'per_class'}] of each replica at its lowest evaluation loss, or as it is;
        `now` is what the last evaluation measured as it is, if it did."""
        exp, tta = self.exp, self.exp.config.eval.tta
        records = [self.best_record(i) for i in range(len(self.replicas))]
        steps = self.put(np.array([r["step"] if r else self.step for r in records], np.int32))
        has_best = self.put(np.array([r is not None for r in records]))
        states = tuple(
            state.replace(step=step, **_chosen(mask, best, state.variables))
            for state, step, mask, best in zip(self.state, steps, has_best, self.best, strict=True)
        )
        known = now and exp.validation is None and not any(records)
        plain = now if known else self.measure(states, exp.test)
        averaged = plain if tta == "none" else self.measure(states, exp.test, tta)
        found = []
        for metrics, more in zip(plain, averaged, strict=True):
            test = {**figures(metrics.summary()), "augmented": exp.config.eval.augmented}
            if tta != "none":
                test |= {"tta": tta, "accuracy_tta": more.summary()["accuracy"]}
            found.append({"test": test, "per_class": per_class(metrics, exp)})
        return found


def summarize(replicas):
    """[{lr, weight_decay, replicas, diverged, test, difference}] by setting.

    `test`: significance.interval of the test accuracy over the seeds that did not diverge;
    `difference`: significance.paired with the first setting over the seeds both have; else None.
    """
    found, first = [], None
    for setting, group in itertools.groupby(replicas, lambda r: [r[name] for name in VARIED]):
        group = [*group]
        good = {
            r["seed"]: r["test"]["accuracy"]
            for r in group
            if r["status"] != "diverged" and "test" in r
        }
        both = [] if first is None else sorted(good.keys() & first.keys())
        found.append(
            {
                **dict(zip(VARIED, setting, strict=True)),
                "replicas": len(group),
                "diverged": sum(r["status"] == "diverged" for r in group),
                "test": interval([*good.values()]) if good else None,
                "difference": paired([good[s] for s in both], [first[s] for s in both])
                if both
                else None,
            }
        )
        first = good if first is None else first
    return found


@jax.jit
def _chosen(mask, ours, theirs):
    """Of each replica `ours` where `mask` [replicas], else `theirs`."""

    def choose(a, b):
        return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b)

    return jax.tree.map(choose, ours, theirs)


def _is_finite(value):
    return value is not None and math.isfinite(value)
