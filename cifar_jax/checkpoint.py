"""Checkpoints of a run: the best evaluation loss and the latest, with Orbax. The only file that
says orbax.

A checkpoint is three items: `model` (params, batch_stats: all that evaluation needs), `training`
(step, optimizer state, key, the sums of the epoch under way) and `meta` (JSON).
"""

import math
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from cifar_jax import InputError

VERSION = 1


def _eval_loss(metrics):
    """The figure that ranks checkpoints; a missing or non-finite loss is never the best."""
    loss = (metrics or {}).get("eval_loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _model(state):
    """The item `model` of a TrainState."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def _training(state, epoch_metrics):
    """The item `training` of a TrainState and the sums of its epoch."""
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "key": jax.random.key_data(state.key),
        "epoch_metrics": epoch_metrics,
    }


class Checkpoints:
    """The checkpoints of one run, by global step. Saving is asynchronous: use it as a context
    manager.

    Every restored array gets `sharding`, so a run may move to another number of devices.
    `read_only` for looking at a run that may be alive: nothing in the directory is touched.
    """

    def __init__(self, directory, sharding, read_only=False):
        self.sharding = sharding
        keep = policies.AnyPreservationPolicy(
            [policies.LatestN(2), policies.BestN(get_metric_fn=_eval_loss, reverse=True, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_eval_loss,
            best_mode="min",
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self.manager = ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.manager.close()  # waits for the save under way

    def latest_step(self):
        """The newest step saved, or None."""
        return self.manager.latest_step()

    def best_step(self):
        """The step with the lowest finite evaluation loss, or None."""
        self.wait()
        best = self.manager.best_step()
        if best is None or not math.isfinite(_eval_loss(self.manager.metrics(best))):
            return None
        return best

    def wait(self):
        """Wait until the save under way is on disk; raises what went wrong with it."""
        self.manager.wait_until_finished()

    def save(self, state, epoch_metrics, meta, eval_loss=None):
        """Save under the state's step; `eval_loss` where the model was evaluated at it."""
        step = int(state.step)
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(_model(state)),
            training=ocp.args.StandardSave(_training(state, epoch_metrics)),
            meta=ocp.args.JsonSave({"version": VERSION, **meta}),
        )
        loss = _eval_loss({} if eval_loss is None else {"eval_loss": eval_loss})
        if step in self.manager.all_steps():
            return
        if not self.manager.save(step, args=items, metrics={"eval_loss": loss}):
            raise OSError(f"the checkpoint of step {step} was not saved")

    def restore_model(self, step, state):
        """`state` with the params and batch_stats of checkpoint `step`."""
        return state.replace(**self._restore(step, model=_model(state))["model"])

    def restore_best(self, state):
        """`state` with the best checkpoint's step, params, batch_stats; InputError if none."""
        step = self.best_step()
        if step is None:
            raise InputError(f"{self.manager.directory} holds no evaluated checkpoint yet")
        step_array = jax.device_put(np.int32(step), self.sharding)
        return self.restore_model(step, state).replace(step=step_array)

    def restore(self, step, state, epoch_metrics):
        """(state, epoch_metrics, meta) of checkpoint `step`; the arguments give structure, shapes
        and dtypes."""
        training = _training(state, epoch_metrics)
        items = self._restore(step, model=_model(state), training=training, meta=None)
        if items["meta"].get("version") != VERSION:
            found = items["meta"].get("version")
            raise InputError(
                f"checkpoint {self.manager.directory / str(step)} has format {found}, not {VERSION}"
            )
        training = items["training"]
        state = state.replace(
            step=training["step"],
            **items["model"],
            opt_state=training["opt_state"],
            key=jax.random.wrap_key_data(training["key"]),
        )
        return state, training["epoch_metrics"], items["meta"]

    def _restore(self, step, **targets):
        def abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding)

        arguments = {
            name: ocp.args.JsonRestore()
            if target is None
            else ocp.args.StandardRestore(jax.tree.map(abstract, target))
            for name, target in targets.items()
        }
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"checkpoint {self.manager.directory / str(step)} cannot be read: {first}"
            ) from error
