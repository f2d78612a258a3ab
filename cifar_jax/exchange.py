"""--mode=export and --mode=import: the network out as a program or as weights, and weights in."""

import hashlib
import pathlib

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file, save

from cifar_jax import InputError, data, meant_file, weights
from cifar_jax import workdir as files
from cifar_jax.augment import normalize
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.experiment import (
    describe_data,
    make_augments,
    make_experiment,
    restore_best,
)
from cifar_jax.models.layers import plain_convolutions
from cifar_jax.provenance import environment
from cifar_jax.steps import make_predict

SUFFIXES = {"torch": ".pt", "safetensors": ".safetensors", "stablehlo": ".stablehlo"}
PLATFORMS = ("cpu", "cuda")  # that a program runs on
CHECKED = 100  # test images that a file is tried on
# how far its logits may be from the checkpoint's, as a share of the largest: convolutions are
# computed in another form; PyTorch's side is in float32 whatever the dtype
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


def load_torch_twin():
    """The package torch_twin; InputError if PyTorch is not installed."""
    try:
        from cifar_jax import torch_twin
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError("this needs PyTorch, which is not installed: pip install torch") from error
    return torch_twin


def export_best(config, workdir, format):
    """Write the best checkpoint to workdir/export/MODEL.pt, .safetensors or .stablehlo.

    The first two are a PyTorch state_dict, for torch_twin.create_twin(**config.model). The third is
    a program that runs with JAX alone: uint8 images [B, H, W, 3], any B, -> logits
    [B, num_classes], the normalisation in it, the views of config.eval.tta not. MODEL.json says
    what all of them need beside them. The file is read back before it gets its name: its weights
    must be the checkpoint's, its logits of CHECKED test images within TOLERANCE. Returns its path.
    """
    trained = restore_best(config, workdir)
    _, transform = make_augments(config, trained.image_shape)
    predict = make_predict(trained.model, transform=transform)
    files.check_data(trained.path, describe_data(config)._asdict())
    images = data.load(config.data.name, config.data.dir, "test").images[:CHECKED]
    folder = files.writable(trained.path / "export")
    target = folder / f"{config.model.name}{SUFFIXES[format]}"
    part = folder / f".part-{target.name}"
    write, read = {
        "torch": (_write_torch, _torch_logits),
        "safetensors": (_write_safetensors, _flax_logits),
        "stablehlo": (_write_program, _program_logits),
    }[format]
    try:
        with jax.default_matmul_precision("highest"):  # as PyTorch on a CPU, wherever this is
            expected = np.asarray(jax.jit(predict)(trained.state, trained.state.key, images))
            write(part, config, trained)
            found = np.asarray(read(part, config, trained, images))
        apart = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not apart <= TOLERANCE[config.model.dtype]:
            raise InputError(
                f"{part} gives other logits ({apart:.1e} of the largest); nothing exported"
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    step = int(trained.state.step)
    about = {
        "model": config.model.to_dict(),
        "class_names": trained.class_names,
        "image_shape": trained.image_shape,
        "normalize": config.augment.normalize.to_dict(),
        "step": step,
        **environment(),
    }
    files.write_json(folder / f"{config.model.name}.json", about)
    print(
        f"{target}: {target.stat().st_size:,} bytes, step {step}; read back, its logits of "
        f"{len(images)} test images are within {apart:.0e} of the checkpoint's"
    )
    return target


def _state_dict(config, trained):
    """(Flax variables, PyTorch's state_dict), numpy."""
    state = trained.state
    variables = jax.device_get(state.variables)
    step = int(state.step)
    return variables, weights.to_state_dict(config.model.name, trained.model, variables, step=step)


def _write_torch(path, config, trained):
    load_torch_twin().save_file(path, _state_dict(config, trained)[1])


def _write_safetensors(path, config, trained):
    metadata = {"format": "pt", "model": config.model.name}
    # not save_file, which makes it this user's alone
    path.write_bytes(save(_state_dict(config, trained)[1], metadata=metadata))


def _write_program(path, config, trained):
    state = jax.device_get(trained.state.replace(key=None))  # for one device, whatever is here
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *trained.image_shape), np.uint8)

    def transform(key, images):  # as make_augments' normalize, but without its unused keys
        return normalize(key, images.astype(np.float32), **config.augment.normalize)

    predict = make_predict(trained.model, transform=transform)
    with plain_convolutions():  # the form for a single CPU would be everyone's
        program = export.export(jax.jit(lambda x: predict(state, None, x)), platforms=PLATFORMS)
        path.write_bytes(program(images).serialize())


def _flax_logits(path, config, trained, images):
    """Of the weights in a file, which must be the checkpoint's, by the network here."""
    variables, _ = _state_dict(config, trained)
    name = config.model.name
    again = weights.from_state_dict(name, trained.model, variables, read_weights(path))
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, variables, again))):
        raise InputError(f"{path} does not hold what was written; nothing exported")
    _, transform = make_augments(config, trained.image_shape)
    predict = jax.jit(make_predict(trained.model, transform=transform))
    return predict(trained.state.replace(**again), trained.state.key, images)


def _torch_logits(path, config, trained, images):
    """Of the same by PyTorch."""
    _flax_logits(path, config, trained, images[:1])
    twin = load_torch_twin()
    network = make_twin(config, trained.class_names, trained.image_shape)
    twin.load_weights(network, read_weights(path))
    _, transform = make_augments(config, trained.image_shape)
    return twin.predict(network, np.asarray(transform(trained.state.key, images)))


def _program_logits(path, config, trained, images):
    """Of a program, in a batch and one by one."""
    program = export.deserialize(bytearray(path.read_bytes()))
    first = np.asarray(program.call(images[:1]))
    return np.concatenate([first, np.asarray(program.call(images))[1:]])


def make_twin(config, class_names, image_shape):
    """The torch.nn module of the config's network; InputError where PyTorch's side has none."""
    height, width = image_shape[:2]
    if height != width:
        raise InputError(f"PyTorch's networks take square images, not {width} x {height}")
    return load_torch_twin().create_twin(
        **config.model, num_classes=len(class_names), image_size=height
    )


def read_weights(path):
    """{name: numpy array} of a .safetensors or PyTorch file; InputError if it cannot be read."""
    path = files.absolute(path)
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file{meant_file(path)}")
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
        variables = state.variables
        taken = weights.from_state_dict(config.model.name, exp.model, variables, state_dict)
        taken = jax.device_put(taken, exp.placement)
        state = state.with_variables(taken)
        metrics, _ = exp.evaluate(state, exp.test if exp.validation is None else exp.validation)
        summary = metrics.summary()
        if not np.isfinite(summary["loss"]):
            raise InputError(f"the loss with the weights of {source} is not finite")
        with Checkpoints(path / "checkpoints", exp.placement) as checkpoints:
            none = exp.no_metrics()
            meta = {"train_seconds": 0.0, "records": [], "rollbacks": []}
            checkpoints.save(state, none, meta, summary["loss"])
        digest = hashlib.sha256(pathlib.Path(source).expanduser().read_bytes()).hexdigest()
        imported = {"file": str(source), "sha256": digest}
        # last: without it the folder is refused, so that no run starts over from random weights
        files.write_json(
            path / "config.json",
            {
                "config": config.to_dict(),
                "data": exp.about_data,
                "imported": imported,
                **environment(),
            },
        )
        print(f"{path}: weights of {source}, accuracy {summary['accuracy']:.2f} %")
        return summary
