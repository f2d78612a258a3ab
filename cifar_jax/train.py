"""A whole run: restore, train, evaluate, log, save, report."""

import contextlib
import functools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import report, sharding
from cifar_jax import workdir as files
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.evaluate import OTHER_VIEWS, figures, figures_of, other_views, per_class
from cifar_jax.experiment import make_experiment
from cifar_jax.interruption import Interruption
from cifar_jax.progress import progress
from cifar_jax.provenance import environment
from cifar_jax.samples import first_filters, sample_images
from cifar_jax.tensorboard import TensorBoard

PROFILED = 3  # steps in a trace
MAX_ROLLBACKS = 3  # of a run, with config.on_nonfinite = "rollback"


def train_and_evaluate(config, workdir):
    """Train as `config` says, resuming if `workdir` holds this run; returns result.json's content.

    status: 'done'; 'stopped' (at config.stop_after); 'interrupted' (SIGTERM or SIGINT: the same
    command goes on); 'diverged' (a non-finite loss or state). Raises InputError for bad input.
    """
    finished = files.finished_result(workdir, config.to_dict())
    if finished:
        accuracy = finished["test"]["accuracy"]
        print(f"{workdir} holds this run, finished: test accuracy {accuracy:.2f} %")
        return finished
    sharding.use_cores(config.batch_size)
    with contextlib.ExitStack() as held:
        with sharding.in_turn():
            path = held.enter_context(files.only_writer(workdir))
            files.check_workdir(path, config.to_dict())  # before the data are loaded
            exp = make_experiment(config)  # signals end this, which may be a long download
            interruption = held.enter_context(Interruption())
            files.open_workdir(path, config.to_dict(), environment(), exp.about_data)
        sharding.check_same(f"{config.stop_after} {exp.provenance}", "stop_after and data")
        checkpoints = held.enter_context(Checkpoints(path / "checkpoints", exp.placement))
        run = Run(exp, path, checkpoints)
        held.callback(run.close_log)
        run.restore()
        if config.profile:
            run.profile()
        status = run.train(interruption)
        result = run.finish(status)
        sharding.gather("written")  # nobody leaves before the writer is done
    if status == "diverged":
        print(
            f"diverged at step {result['diverged_at']}: the loss or the state is not finite; no "
            "checkpoint holds it; lower the learning rate (config.schedule.peak_lr), clip "
            "(config.optim.clip_norm) or go on with --config.on_nonfinite=rollback",
            file=sys.stderr,
        )
    elif status != "interrupted":
        epochs, best = result["epochs"], result["best"]["epoch"]
        of = "" if best == epochs else f" (of epoch {best:g}, whose evaluation loss was lowest)"
        print(f"{status} at epoch {epochs:g}: test {result['test']['accuracy']:.2f} %{of}")
    return result


def all_finite(state):
    """Whether parameters, statistics and moments hold no infinity and no NaN."""
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state, state.slow))
    checks = [jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.array(checks).all()


class Run:
    """The state of one run in its workdir; see train_and_evaluate."""

    mode = "train"

    def __init__(self, exp, path, checkpoints):
        self.exp, self.path, self.checkpoints = exp, path, checkpoints
        self.state, self.no_metrics = self.begin()
        self.metrics = self.no_metrics  # sums of the epoch under way
        self.records = []
        self.train_seconds = 0.0  # of the epoch under way
        self.compile_seconds = 0.0
        self.finish_seconds = 0.0  # of the last evaluations
        self.programs = {}
        self.rollbacks = ()  # the steps gone back to, one for each time
        self.unsaved = False  # whether the last epoch left no checkpoint
        self.log = None  # a TensorBoard where config.log asks for it
        self.diverged_at = None
        self.finite = jax.jit(all_finite)
        self.eval_set = exp.test if exp.validation is None else exp.validation

    def begin(self):
        """(the initial state, the sums over no image)."""
        return self.exp.init_state(), self.exp.no_metrics()

    @property
    def step(self):
        """Training steps done."""
        return int(self.state.step)

    def saved(self):
        """What a checkpoint holds: (TrainState, sums of the epoch under way)."""
        return self.state, self.metrics

    def take(self, state, sums):
        """Go on from what `saved` gave."""
        self.state, self.metrics = state, sums

    def restore(self):
        """Go on from the latest checkpoint, if there is one."""
        found = self.checkpoints.restore_latest(*self.saved())
        if found:
            state, sums, meta = found
            self.take(state, sums)
            self.train_seconds = meta["train_seconds"]
            before = meta.get("compile_seconds", 0.0)  # older checkpoints lack it
            self.compile_seconds = max(before, self.compile_seconds)
            self.records = meta["records"]
            self.slow_down(meta["rollbacks"])
            print(f"resuming {self.path} at epoch {self.exp.epochs_at(self.step):g}", flush=True)
        files.remove(self.path / files.RESULTS[self.mode])  # until this run says how it ended
        files.rewrite_metrics(self.path / "metrics.jsonl", self.records)
        with sharding.together():
            self.open_log()

    def open_log(self):
        """Begin tensorboard/ anew with the records so far and the data, where it is asked for."""
        self.close_log()
        if not (self.exp.config.log.tensorboard and sharding.is_writer()):
            return
        self.log = TensorBoard(self.path / "tensorboard", self.records)
        figures = report.draw_samples(self.samples, self.exp.class_names)
        self.log.add_pictures(report.render(figures), self.step)

    def close_log(self):
        if self.log:
            self.log.close()
        self.log = None

    @functools.cached_property
    def samples(self):
        """What report.draw_samples draws."""
        exp, config = self.exp, self.exp.config
        return sample_images(
            exp.train, exp.augment, config.augment.normalize, exp.class_names, config.seed
        )

    def slow_down(self, rollbacks):
        """From each of the steps `rollbacks` on train at half the learning rate."""
        self.rollbacks = tuple(rollbacks)
        if self.rollbacks:
            config, exp = self.exp.config.copy_and_resolve_references(), self.exp
            with config.unlocked():
                config.schedule.halve_at = self.rollbacks
            splits = {"train": exp.train, "validation": exp.validation, "test": exp.test}
            splits = {name: split for name, split in splits.items() if split is not None}
            self.exp = make_experiment(config, splits=splits, class_names=exp.class_names)
            self.programs = {}

    def roll_back(self):
        """Whether it could: to the newest checkpoint, or the beginning, and on more slowly."""
        if self.exp.config.on_nonfinite == "stop" or len(self.rollbacks) == MAX_ROLLBACKS:
            return False
        before = self.rollbacks
        self.state, self.metrics, self.records = self.exp.init_state(), self.no_metrics, []
        self.train_seconds, self.unsaved = 0.0, False
        self.checkpoints.wait()
        self.restore()
        step = self.step
        self.slow_down((*before, step))
        print(
            f"diverged at step {self.diverged_at}; from step {step} on again at "
            f"{0.5 ** len(self.rollbacks):g} of the learning rate",
            file=sys.stderr,
        )
        self.diverged_at = None
        return True

    def profile(self):
        """Trace PROFILED steps, after as many to warm up, to profile/ in the workdir.

        They work on a copy of the state: the run goes on as if they had not been. TensorBoard
        opens the folder; Perfetto (ui.perfetto.dev) the perfetto_trace.json.gz in it.
        """
        exp, size = self.exp, self.exp.config.batch_size
        counts = exp.in_calls(PROFILED)
        state = jax.tree.map(jnp.copy, self.state)
        calls = {n: exp.compile_steps((n, size, ()), state, self.no_metrics) for n in {*counts}}
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the device's work, not ours
        folder = self.path / "profile"
        for warm in (False, True):
            with (
                jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options)
                if warm and sharding.is_writer()
                else contextlib.nullcontext()
            ):
                for n in counts:
                    state, _ = calls[n](state, self.no_metrics, exp.train)
                jax.block_until_ready(state)
        print(f"{PROFILED} steps traced in {folder}", flush=True)

    def train(self, interruption):
        """Train to the end, to stop_after or to an interruption; returns the status."""
        exp, config = self.exp, self.exp.config
        end = exp.end_step
        step = self.step
        while step < end:
            if interruption.requested:
                if self.unsaved:
                    self.save()
                return "interrupted"
            if step in exp.schedules.restarts and config.schedule.get("from_best"):
                self.return_to_best()
            step = self.train_epoch(step, end, interruption)
            self.diverged_at = self.find_divergence(step)
            if self.diverged_at is None:
                # interrupted or stopped within the epoch, there is nothing to evaluate yet
                self.end_epoch(step) if exp.ends_epoch(step) else self.save()
            elif self.roll_back():
                step = self.step
            else:
                return "diverged"
        if step == exp.total_steps:
            return "done"
        return "interrupted" if interruption.requested else "stopped"

    def return_to_best(self):
        """Go on with the weights and statistics of the lowest evaluation loss so far."""
        if self.checkpoints.best_step() is not None:
            best = self.checkpoints.restore_best(self.state)
            self.state = self.state.with_variables(best.variables)

    def plan(self, step, end):
        """Calls (number of steps, size, frozen layers) from `step` to its epoch's end or `end`.

        Calls begin at the same steps however often a run is interrupted.
        """
        frozen = self.exp.schedules.frozen(step)
        per_epoch, batch_size = self.exp.steps_per_epoch, self.exp.config.batch_size
        n = self.exp.train.images.shape[0]
        full, tail = divmod(n, batch_size)
        i, limit = step % per_epoch, min(per_epoch, end - step + step % per_epoch)
        k = self.exp.steps_per_call
        while i < min(full, limit):
            count = min(k - i % k, full - i, limit - i)
            yield count, batch_size, frozen
            i += count
        if i < limit:
            yield 1, tail, frozen

    def program(self, call):
        """The call, compiled when it is first needed: the first step waits for its own alone."""
        if call not in self.programs:
            jax.block_until_ready(self.state)  # training and compiling are timed apart
            start = time.perf_counter()
            with jax.transfer_guard("allow"):
                self.programs[call] = self.compile_call(call)
            self.compile_seconds += time.perf_counter() - start
        return self.programs[call]

    def compile_call(self, call):
        """One call of `plan`, compiled: (state, sums, dataset) -> (state, sums)."""
        return self.exp.compile_steps(call, self.state, self.metrics)

    @functools.cached_property
    def evaluate(self):
        """The evaluation, compiled when it is first needed: the first step does not wait for it."""
        start = time.perf_counter()
        program = self.exp.evaluate.lower(self.state, self.eval_set).compile()
        self.compile_seconds += time.perf_counter() - start
        return program

    def train_epoch(self, step, end, interruption):
        """Run the rest of the epoch `step` lies in, or to a loss that is not finite; returns the
        step reached."""
        exp, config, per_epoch = self.exp, self.exp.config, self.exp.steps_per_epoch
        epoch = step // per_epoch
        first = exp.images_at(epoch * per_epoch)
        start, before, compiled = time.perf_counter(), self.train_seconds, self.compile_seconds
        bar = progress(
            f"epoch {epoch + 1}/{config.epochs:g}",
            exp.images_at(min((epoch + 1) * per_epoch, exp.total_steps)) - first,
            exp.images_at(step) - first,
            sharding.is_writer(),
        )
        with bar, jax.transfer_guard("disallow"):
            for call in self.plan(step, end):
                previous = self.metrics
                program, (count, size, _) = self.program(call), call
                self.state, self.metrics = program(self.state, self.metrics, exp.train)
                step += count
                # waiting for the call before keeps one in flight: the device never waits for us
                now = self.total(previous)
                if not math.isfinite(now.loss):
                    break
                if not bar.disable:
                    told = now.summary()
                    told = f"loss {told['loss']:.4f}, {told['accuracy']:.2f} %"
                    bar.set_postfix_str(told, refresh=False)
                bar.update(count * size)
                if interruption.requested:
                    break
            jax.block_until_ready(self.state)
        compiled = self.compile_seconds - compiled
        self.train_seconds = before + time.perf_counter() - start - compiled
        return step

    def total(self, metrics):
        """The sums so far, on the host; their loss is not finite if it makes no sense to go on."""
        return jax.device_get(metrics)

    def find_divergence(self, step):
        """The step (1, 2, ...) whose loss was the first of this epoch not to be finite; `step` if
        only the state is not; else None."""
        sums = jax.device_get(self.metrics)
        if math.isfinite(sums.loss):
            return None if self.finite(self.state) else step
        return self.epoch_begin(step) + int(sums.finite) // self.exp.config.batch_size + 1

    def end_epoch(self, step):
        """Evaluate, log and save at the end of an epoch."""
        exp = self.exp
        train = self.metrics.summary()
        evaluate = self.evaluate  # compiled before the clock starts
        start = time.perf_counter()
        metrics, _ = evaluate(self.state, self.eval_set)
        measured = metrics.summary()
        eval_seconds = time.perf_counter() - start
        learning_rate = float(exp.schedules.learning_rate(step - 1))
        record = self.record(step, learning_rate, train, measured, eval_seconds)
        self.records.append(record)
        files.append_metrics(self.path / "metrics.jsonl", record)
        self.metrics, self.train_seconds = self.no_metrics, 0.0
        print(
            f"epoch {record['epoch']:3g}/{exp.config.epochs:g}  lr {record['lr']:.3g}  "
            f"train {train['loss']:.4f} {train['accuracy']:.2f} %  "
            f"eval {measured['loss']:.4f} {measured['accuracy']:.2f} %  "
            f"{record['images_per_second']:,.0f} images/s  {record['seconds']:.1f} s",
            flush=True,
        )
        self.save_when_due(step, measured["loss"])
        if self.log:
            self.log.add_record(record)

    def record(self, step, learning_rate, train, measured, eval_seconds):
        """A line of metrics.jsonl; `train` and `measured` are summaries of Metrics."""
        return {
            "epoch": self.exp.epochs_at(step),
            "step": step,
            "lr": learning_rate,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "eval_loss": measured["loss"],
            "eval_accuracy": measured["accuracy"],
            "eval_top3": measured["top3"],
            "eval_top5": measured["top5"],
            "images_per_second": self.images_of_epoch(step) / self.train_seconds,
            "seconds": self.train_seconds + eval_seconds,
        }

    def images_of_epoch(self, step):
        """Images trained on in the epoch that ends at `step`."""
        return self.exp.images_at(step) - self.exp.images_at(self.epoch_begin(step))

    def epoch_begin(self, step):
        """The step at which the epoch that reached `step` began."""
        return (step - 1) // self.exp.steps_per_epoch * self.exp.steps_per_epoch

    def due(self, step):
        """Whether an epoch's end leaves a checkpoint that may be the best: every
        config.save_every epochs and at the end, however often the run stops between."""
        return (
            self.exp.epochs_at(step) % self.exp.config.save_every == 0
            or step == self.exp.total_steps
        )

    def save_when_due(self, step, eval_loss=None):
        """`save` where it is due, and where this run stops."""
        if self.due(step):
            self.save(eval_loss)
        elif step == self.exp.end_step:
            self.save()
        else:
            self.unsaved = True

    def save(self, eval_loss=None):
        """Save a checkpoint of the state and all that a resumed run needs beside it."""
        self.unsaved = False
        meta = {
            "train_seconds": self.train_seconds,
            "compile_seconds": self.compile_seconds,
            "records": self.records,
            "rollbacks": self.rollbacks,
        }
        self.checkpoints.save(*self.saved(), meta, eval_loss)

    def finish(self, status):
        """Measure the best checkpoint on the test set, draw the report, write result.json last.

        An interrupted run only says where it stands: whoever asked it to stop may not wait.
        """
        exp, config, step = self.exp, self.exp.config, self.step
        self.checkpoints.wait()
        start, compiled = time.perf_counter(), self.compile_seconds
        found, seen = self.measure_end(status)
        # of which the compilation of `evaluate`, if it was not needed before, counts as that
        self.finish_seconds = time.perf_counter() - start - (self.compile_seconds - compiled)
        imported = files.read_json(self.path / "config.json").get("imported")
        result = {
            "status": status,
            "model": config.model.name,
            "params": exp.count_params(),
            "dataset": exp.provenance,
            "seed": config.seed,
            **({"imported": imported} if imported else {}),
            **({"diverged_at": self.diverged_at} if self.diverged_at else {}),
            **({"rollbacks": [*self.rollbacks]} if self.rollbacks else {}),
            "epochs": exp.epochs_at(step),
            "epochs_planned": config.epochs,
            "steps": step,
            **found,
            "seconds": self.seconds(self.records),
            "devices": jax.device_count(),
            **environment(),
        }
        if config.report and status in ("done", "stopped") and sharding.is_writer():
            self.write_report(result, *seen)
        if self.log and "test" in found:
            self.log.add_scalars({"accuracy/test": found["test"]["accuracy"]}, step)
        files.write_json(self.path / "result.json", result)
        return result

    def measure_end(self, status):
        """(result.json's 'best', 'last', 'test' and 'per_class', (state, metrics, logits) of the
        best checkpoint on the test images).

        Of an interrupted run ('best' and 'last' alone, None).
        """
        exp, step = self.exp, self.step
        best_step, measured, seen = self.checkpoints.best_step(), {}, None
        last = figures_of(self.records[-1]) if self.records else None
        if status != "interrupted":
            state = self.state
            if best_step is not None:
                state = self.checkpoints.restore_best(self.state)
                best_step = int(state.step)
            measure = self.evaluate if exp.validation is None else exp.evaluate
            metrics, logits = measure(state, exp.test)
            seen = state, metrics, logits
            measured = {
                "test": {
                    **figures(metrics.summary()),
                    "augmented": exp.config.eval.augmented,
                    **other_views(exp, state),
                },
                "per_class": per_class(metrics, exp),
            }
            if not exp.ends_epoch(step) and status != "diverged":
                now = metrics
                if state is not self.state or exp.validation is not None:
                    now, _ = self.evaluate(self.state, self.eval_set)
                last = {"epoch": exp.epochs_at(step), **figures(now.summary())}
            if last and exp.validation is None and status != "diverged":
                # the best is chosen by the loss on these images, the last by nothing
                views = measured["test"] if best_step == step else other_views(exp, self.state)
                last |= {key: views[key] for key in OTHER_VIEWS if key in views}
        best = next((figures_of(r) for r in self.records if r["step"] == best_step), last)
        if best_step is None and status == "diverged":
            best = None  # what there is has diverged
        if best_step == 0 and measured:  # imported weights, never bettered: no epoch has this
            begin = metrics if exp.validation is None else self.evaluate(state, self.eval_set)[0]
            best = {"epoch": 0, **figures(begin.summary())}
        return {"best": best, "last": last, **measured}, seen

    def write_report(self, result, state, metrics, logits):
        """report/ from result.json's content and what measure_end saw."""
        exp, step = self.exp, self.step
        pictures = report.write_report(
            self.path / "report",
            result=result,
            records=self.records,
            class_names=exp.class_names,
            confusion=np.asarray(metrics.confusion),
            logits=np.asarray(logits),
            images=np.asarray(exp.test.images),
            labels=np.asarray(exp.test.labels),
            samples=self.samples,
            learning_rate=np.asarray(exp.schedules.learning_rate(np.arange(max(step, 1)))),
            config=exp.config.to_dict(),
            filters=first_filters(state),
        )
        if self.log:
            self.log.add_pictures(pictures, step)

    def seconds(self, records):
        """Seconds spent, of result.json; `records` has one of each epoch."""
        train = sum(self.images_of_epoch(r["step"]) / r["images_per_second"] for r in records)
        evaluation = sum(r["seconds"] for r in records) - train + self.finish_seconds
        train += self.train_seconds
        parts = {"compile": self.compile_seconds, "train": train, "eval": evaluation}
        return {**parts, "total": sum(parts.values())}
