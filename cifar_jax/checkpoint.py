"""Checkpoints of a run, the best evaluation loss and the latest: the only file that says orbax.

A checkpoint is three items: `model` (params, batch_stats: all that evaluation needs), `training`
(step, optimizer state, key, the sums of the epoch under way, lookahead's weights), `meta` (JSON).
"""

import contextlib
import ctypes
import gc
import json
import logging
import math
import pathlib
import shutil
import sys
import time
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import checkpoint_managers as policies

from cifar_jax import InputError, first_line
from cifar_jax.sharding import in_turn, is_alone, is_writer, together

# Orbax asks for these figures at every save, to log them, and what is returned is never freed
# (tensorstore 0.1.86: about 48 objects a save): a run would grow with every checkpoint.
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []

# glibc's, where there is one: it gives freed memory back. Every thread of Orbax's leaves a heap of
# its own that it frees but keeps (after 50 saves of a small run 1,069 MiB were resident, 566 when
# trimmed, 185 in use).
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)

VERSION = 3
JOB_SECONDS = 300  # of one save by many processes: where one cannot write, the others wait so long


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read or whose content is not what was saved."""


def _kinds(tree):
    """{path: dtype and shape} of every array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _checksums(tree):
    """{path: dtype, shape and CRC-32} of every array: Orbax has none and restores flipped bits."""
    arrays = [np.ascontiguousarray(x.addressable_data(0)) for x in jax.tree.leaves(tree)]
    crcs = [f"{zlib.crc32(x.tobytes()):08x}" for x in arrays]
    return {
        path: f"{kind} {crc}" for (path, kind), crc in zip(_kinds(tree).items(), crcs, strict=True)
    }


@contextlib.contextmanager
def _silent_leftovers():
    """Nothing on stderr from the coroutines that Orbax leaves behind when a restore fails.

    What it leaves dies now or later, up to the interpreter's end, complaining of a closed loop or
    of an error that nobody fetched (one of many: the first is the one that is told).
    """
    logging.getLogger("asyncio").addFilter(_is_no_leftover)
    before = sys.unraisablehook

    def later(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = lambda unraisable: None
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = later


def _is_no_leftover(record):
    return not record.getMessage().startswith(
        ("Task exception was never retrieved", "Task was destroyed but it is pending")
    )


def _unranked(directory):
    """[(step, what is wrong)] of the checkpoints whose evaluation loss cannot be read."""
    for path in sorted(directory.glob("*/metrics/metrics")):
        step = path.parent.parent.name
        try:
            if step.isdigit():  # else what a killed save left, or what was set aside
                json.loads(path.read_text())
        except FileNotFoundError:
            continue  # deleted just now by the run whose it is
        except (OSError, ValueError, RecursionError) as error:
            yield step, f"metrics, {error}"


def _set_aside(path):
    """Rename a damaged checkpoint so that its step is free and nothing of it is lost."""
    path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))


def _checksum_of_json(value):
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _eval_loss(metrics):
    """The figure that ranks checkpoints; a missing or non-finite loss is never the best."""
    loss = metrics.get("eval_loss") if isinstance(metrics, dict) else None
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


def _training(state, epoch_metrics):
    """The item `training` of a TrainState and the sums of its epoch."""
    slow = {} if state.slow is None else {"slow": state.slow}  # only where there is lookahead
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "key": jax.random.key_data(state.key),
        "epoch_metrics": epoch_metrics,
        **slow,
    }


class Checkpoints:
    """The checkpoints of one run, by global step; a context manager, for saving is asynchronous.

    Every restored array gets `sharding`, so a run may move to another number of devices.
    `read_only` for looking at a run that may be alive: nothing in the directory is touched.
    """

    def __init__(self, directory, sharding, read_only=False):
        self.sharding, self.read_only = sharding, read_only
        directory = pathlib.Path(directory).absolute()
        with in_turn():
            for step, reason in _unranked(directory):  # Orbax could not even list the others
                error = f"checkpoint {directory / str(step)} is damaged: {reason}"
                if read_only:
                    raise DamagedCheckpoint(error)
                print(f"{error}; set aside", file=sys.stderr)
                _set_aside(directory / str(step))
        keep = policies.AnyPreservationPolicy(
            [policies.LatestN(2), policies.BestN(get_metric_fn=_eval_loss, reverse=True, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_eval_loss,
            best_mode="min",
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            async_options=None if is_alone() else ocp.AsyncOptions(timeout_secs=JOB_SECONDS),
        )
        try:
            self.manager = ocp.CheckpointManager(directory, options=options)
        except Exception as error:  # it reads the metadata of every checkpoint
            reason = first_line(error)
            raise InputError(f"the checkpoints in {directory} cannot be read: {reason}") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Wait for the save under way; its failure never hides an error that came before."""
        if kind and not is_alone():
            return  # a save needs all processes, and another may be gone
        failure = None
        try:
            self.wait()
        except InputError as unwritten:
            failure = unwritten
        try:
            self.manager.close()
        except Exception as close_error:
            failure = failure or self._unwritten(self.manager.latest_step(), close_error)
        if failure and kind is None:
            raise failure

    def best_step(self):
        """The step with the lowest finite evaluation loss, or None."""
        self.wait()
        best = self.manager.best_step()
        if best is None or not math.isfinite(_eval_loss(self.manager.metrics(best))):
            return None
        return best

    def wait(self):
        """Wait until the save under way is on disk; InputError if it did not get there."""
        step = self.manager.latest_step()
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(step, error) from error

    def save(self, state, epoch_metrics, meta, eval_loss=None):
        """Save under the state's step; `eval_loss` where the model was evaluated at it.

        Raises InputError if the disk has no room or the save before did not reach it.
        """
        _trim(0)
        step = int(state.step)
        model, training = state.variables, _training(state, epoch_metrics)
        loss = _eval_loss({} if eval_loss is None else {"eval_loss": eval_loss})
        if step in self.manager.all_steps():
            return
        checksums = {"model": _checksums(model), "training": _checksums(training)}
        meta = {"version": VERSION, "eval_loss": repr(loss), **meta, "checksums": checksums}
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            training=ocp.args.StandardSave(training),
            meta=ocp.args.JsonSave({**meta, "checksum": _checksum_of_json(meta)}),
        )
        size = sum(x.nbytes for x in jax.tree.leaves((model, training)))
        try:
            with together(OSError):
                free = shutil.disk_usage(self.manager.directory).free
                if free < 2 * size:
                    raise OSError(f"{free >> 20} MiB are free, {2 * size >> 20} MiB are needed")
            if not self.manager.save(step, args=items, metrics={"eval_loss": loss}):
                raise OSError("the save was refused")
        except Exception as error:
            raise self._unwritten(step, error) from error

    def _unwritten(self, step, error):
        if isinstance(error, jax.errors.JaxRuntimeError) and not is_alone():
            return error  # another process is gone, nothing is wrong with the disk
        return InputError(
            f"checkpoint {self.manager.directory / str(step)} could not be written "
            f"({first_line(error)}); those before it are whole: make room and run the same command"
        )

    def restore_best(self, state):
        """`state` with the best sound checkpoint's step, params and batch_stats.

        Damaged ones are named on stderr and passed over. Raises InputError if none is left.
        """
        self.wait()
        steps = [step for step in self.manager.all_steps() if step < 2**31]  # no other was saved
        losses = {step: _eval_loss(self._metrics(step)) for step in steps}
        ranked = sorted((step for step in losses if losses[step] < math.inf), key=losses.get)
        told = []
        for step in ranked:
            try:
                state = self.restore_model(step, state)
            except DamagedCheckpoint as error:
                told.append(f"passed over: {error}")
                continue
            break
        left = [(self.manager.directory / str(step)).exists() for step in steps]
        if self.read_only and not all(left):
            self.manager.reload()  # a run that is alive has deleted some: what is its best now?
            return self.restore_best(state)
        for line in told:
            print(line, file=sys.stderr)
        if len(told) < len(ranked):
            return state.replace(step=jax.device_put(np.int32(step), self.sharding))
        if ranked:
            raise InputError(f"{self.manager.directory} holds no sound checkpoint")
        raise InputError(
            f"{self.manager.directory} holds no evaluated checkpoint: train to the end of an epoch"
        )

    def _metrics(self, step):
        try:
            return self.manager.metrics(step)
        except Exception:  # a damaged checkpoint is never the best
            return None

    def restore_model(self, step, state):
        """`state` with the params and batch_stats of checkpoint `step`."""
        return state.replace(**self._restore(step, model=state.variables)["model"])

    def restore_latest(self, state, epoch_metrics):
        """(state, epoch_metrics, meta) of the newest sound checkpoint; None if there is none.

        The arguments give structure, shapes and dtypes. A damaged checkpoint is named on stderr and
        set aside as damaged-STEP, so that the step can be saved again. Raises InputError if all are
        damaged: nothing starts over unasked.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        damaged = []
        for step in steps:
            training = _training(state, epoch_metrics)
            try:
                items = self._restore(step, model=state.variables, training=training)
            except DamagedCheckpoint as error:
                damaged.append((step, error))
                continue
            with in_turn():
                for bad, error in damaged if is_writer() else ():
                    print(f"{error}; set aside, going on from step {step}", file=sys.stderr)
                    _set_aside(pathlib.Path(self.manager.directory) / str(bad))
            if damaged:
                self.manager.reload()
            training = items["training"]
            state = state.replace(
                step=training["step"],
                **items["model"],
                opt_state=training["opt_state"],
                key=jax.random.wrap_key_data(training["key"]),
                slow=training.get("slow"),
            )
            return state, training["epoch_metrics"], items["meta"]
        directory = pathlib.Path(self.manager.directory)
        before = [f"{path} is damaged" for path in sorted(directory.glob("damaged-*"))]
        if damaged or before:
            raise InputError(
                f"{damaged[0][1] if damaged else before[-1]}, and no older checkpoint is sound; "
                f"to start over, delete {directory}"
            )
        return None

    def _restore(self, step, **targets):
        """{item: tree}, checked against the checksums; `meta` always. Raises DamagedCheckpoint (if
        one process finds it so, all do), or InputError for a checkpoint of another format."""
        with together(DamagedCheckpoint):
            return self._restore_here(step, targets)

    def _restore_here(self, step, targets):
        def abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding)

        path = self.manager.directory / str(step)
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        try:
            sound = meta.pop("checksum") == _checksum_of_json(meta)
            before = {name: dict(meta["checksums"][name]) for name in targets}
            kinds = {
                name: {path: text.rpartition(" ")[0] for path, text in sums.items()}
                for name, sums in before.items()
            }
        except Exception:  # it may hold anything
            sound = False
        if not sound:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: meta")
        if meta.get("version") != VERSION:
            raise InputError(f"checkpoint {path} has format {meta.get('version')}, not {VERSION}")
        for name, target in targets.items():  # Orbax would cast another dtype without a word
            there, here = kinds[name], _kinds(target)
            differing = sorted(there.items() ^ here.items())
            if differing:
                key = differing[0][0]
                raise InputError(
                    f"checkpoint {path} does not fit this run: {name}{key} is "
                    f"{there.get(key, 'missing')} there, {here.get(key, 'missing')} here"
                )
        arguments = {
            name: ocp.args.StandardRestore(jax.tree.map(abstract, target))
            for name, target in targets.items()
        }
        items = self._read(step, **arguments)
        for name in targets:
            sums = _checksums(items[name])
            bad = [key for key, value in before[name].items() if sums.get(key) != value]
            if bad:
                raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name}{bad[0]}")
        return {**items, "meta": meta}

    def _read(self, step, **arguments):
        """{item: what Orbax finds}; DamagedCheckpoint, in its words, if it finds nothing sound."""
        reason = None
        with _silent_leftovers():
            try:
                return dict(self.manager.restore(step, args=ocp.args.Composite(**arguments)))
            except Exception as error:
                reason = first_line(error)
        path = self.manager.directory / str(step)
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read: {reason}")
