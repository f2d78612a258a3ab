"""--mode=export and --mode=import: weights out to PyTorch's formats and in from them."""

import hashlib
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from cifar_jax import InputError, weights
from cifar_jax import workdir as files
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.experiment import environment, make_experiment, restore_best
from cifar_jax.metrics import Metrics

SUFFIXES = {"torch": ".pt", "safetensors": ".safetensors"}


def load_torch_twin():
    """The module torch_twin; InputError if PyTorch is not installed."""
    try:
        from cifar_jax import torch_twin
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError("this needs PyTorch, which is not installed: pip install torch") from error
    return torch_twin


def export_weights(config, workdir, format):
    """Write the best checkpoint as a PyTorch state_dict, workdir/export/MODEL.{pt,safetensors}.

    The file is read back and compared with the checkpoint before it gets its name. Returns its
    path. The module that takes the state_dict is torch_twin.create_twin(**config.model).
    """
    path, model, state = restore_best(config, workdir)
    name = config.model.name
    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    state_dict = weights.to_state_dict(name, model, variables, step=int(state.step))
    folder = files.writable(path / "export")
    target = folder / f"{name}{SUFFIXES[format]}"
    part = folder / f".part-{target.name}"
    if format == "torch":
        load_torch_twin().save_file(part, state_dict)
    else:
        save_file(state_dict, part, metadata={"format": "pt", "model": name})
    again = weights.from_state_dict(name, model, variables, read_weights(part))
    same = jax.tree.map(np.array_equal, variables, again)
    if not all(jax.tree.leaves(same)):
        raise OSError(f"{part} does not hold what was written; nothing exported")
    part.replace(target)
    print(f"{target}: {len(state_dict)} tensors, step {int(state.step)}")
    return target


def read_weights(path):
    """{name: numpy array} of a .safetensors or PyTorch file; InputError if it cannot be read."""
    path = files.absolute(path)
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == SUFFIXES["safetensors"]:
        try:
            return load_file(path)
        except Exception as error:  # what it leaves to numpy raises many kinds
            raise InputError(f"{path} is not a safetensors file: {error}") from error
    return load_torch_twin().load_file(path)


def import_weights(config, workdir, source):
    """Begin a run in an empty `workdir` from the weights in the file `source`.

    They are evaluated and become the checkpoint of step 0, from which `evaluate`, `predict` and
    training go on; optimizer and schedule start afresh. Returns their summary on the evaluation
    images. Raises InputError for weights that do not fit and for a workdir that is in use.
    """
    if not source:
        raise InputError("name the weights with --weights=FILE (.pt or .safetensors)")
    state_dict = read_weights(source)
    with files.only_writer(workdir) as path:
        used = [name for name in ("config.json", "checkpoints") if (path / name).exists()]
        if used:
            raise InputError(f"{path} holds a run already ({used[0]}); choose another workdir")
        exp = make_experiment(config)
        state = exp.init_state()
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        taken = weights.from_state_dict(config.model.name, exp.model, variables, state_dict)
        taken = jax.device_put(taken, exp.placement)
        state = state.replace(**taken, slow=None if state.slow is None else taken)
        metrics, _ = exp.evaluate(state, exp.test if exp.validation is None else exp.validation)
        summary = metrics.summary()
        with Checkpoints(path / "checkpoints", exp.placement) as checkpoints:
            none = jax.device_put(Metrics.zeros(len(exp.class_names)), exp.placement)
            meta = {"train_seconds": 0.0, "records": [], "rollbacks": []}
            checkpoints.save(state, none, meta, summary["loss"])
        digest = hashlib.sha256(pathlib.Path(source).expanduser().read_bytes()).hexdigest()
        imported = {"file": str(source), "sha256": digest}
        # last: without it the folder is refused, so that no run starts over from random weights
        files.write_json(
            path / "config.json",
            {"config": config.to_dict(), "imported": imported, **environment()},
        )
        print(f"{path}: weights of {source}, accuracy {summary['accuracy']:.2f} %")
        return summary
