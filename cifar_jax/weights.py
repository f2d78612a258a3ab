"""Weights between Flax variables and PyTorch state_dicts: an explicit map of names and layouts.

Numpy on both sides, no torch. The PyTorch modules that take these names are in torch_twin/.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from cifar_jax import InputError


@dataclasses.dataclass(frozen=True)
class Layer:
    """One Flax layer and its PyTorch counterpart.

    Several PyTorch names: Flax computes those layers as one, their output channels side by side.
    `flattened` is the number of channels of the map that a linear layer reads flattened: Flax
    flattens [H, W, C], PyTorch [C, H, W].
    """

    kind: str  # conv | frozen_conv | linear | batch_norm
    flax: str
    torch: tuple[str, ...]
    flattened: int = 1


# (collection, Flax variable, PyTorch tensor) of each kind; a layer without bias has no such one.
VARIABLES = {
    "conv": (("params", "kernel", "weight"), ("params", "bias", "bias")),
    "frozen_conv": (("batch_stats", "kernel", "weight"), ("params", "bias", "bias")),
    "linear": (("params", "kernel", "weight"), ("params", "bias", "bias")),
    "batch_norm": (
        ("params", "scale", "weight"),
        ("params", "bias", "bias"),
        ("batch_stats", "mean", "running_mean"),
        ("batch_stats", "var", "running_var"),
    ),
}
COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm: steps trained; nothing depends on it


def _conv(name, *torch):
    return Layer("conv", name, torch or (name,))


def _norm(name, *torch):
    return Layer("batch_norm", name, torch or (name,))


def _linear(name, torch=None, flattened=1):
    return Layer("linear", name, (torch or name,), flattened)


def _unit(name):
    """A convolution and its BatchNorm: NAME_conv, NAME_bn against NAME.conv, NAME.bn."""
    return [_conv(f"{name}_conv", f"{name}.conv"), _norm(f"{name}_bn", f"{name}.bn")]


def _head(model):
    """fc1 on the flattened map of the last convolution, fc2, ..."""
    yield _linear("fc1", flattened=model.widths[-1])
    for i in range(2, len(model.head_widths) + 2):
        yield _linear(f"fc{i}")


def _vgg(model):
    for i in range(1, 2 * len(model.widths) + 1):
        yield _conv(f"conv{i}")
        yield _norm(f"bn{i}")
    yield from _head(model)


def _convnet(model):
    for i in range(1, len(model.widths) + 1):
        yield _conv(f"conv{i}")
    yield from _head(model)


def _resnet(model):
    for name in ("prep", "layer1", "res1a", "res1b", "layer2", "layer3", "res3a", "res3b"):
        yield from _unit(name)
    yield _linear("fc")


def _mixture(model):
    for i in range(1, len(model.widths) + 1):
        branches = [f"block{i}.branches.{k}" for k in range(model.branches)]
        if model.sequential:
            for k, branch in enumerate(branches, 1):
                yield _conv(f"block{i}_conv{k}", f"{branch}.conv")
                yield _norm(f"block{i}_bn{k}", f"{branch}.bn")
        else:
            yield _linear(f"block{i}_gate", f"block{i}.gate")
            yield _conv(f"block{i}_conv", *(f"{branch}.conv" for branch in branches))
            yield _norm(f"block{i}_bn", *(f"{branch}.bn" for branch in branches))
    yield _linear("fc1")
    yield _linear("fc2")


def _dilated(model):
    for name in ("c1a", "c1b", "c2a", "c2b", "c3a", "c3b", "c3c", *(f"c4{c}" for c in "abcdef")):
        yield from _unit(name)
    yield _linear("fc1", flattened=128)
    yield _linear("fc2")


def _airbench(model):
    yield Layer("frozen_conv", "whiten", ("whiten",))
    for i in range(1, len(model.widths) + 1):
        for k in range(1, model.depth + 1):
            yield _conv(f"group{i}_conv{k}", f"group{i}.conv{k}")
            yield _norm(f"group{i}_bn{k}", f"group{i}.norm{k}")
    yield _linear("head", flattened=model.widths[-1])


FAMILIES = {
    "vgg": _vgg,
    "convnet": _convnet,
    "resnet": _resnet,
    "mixture": _mixture,
    "dilated": _dilated,
    "airbench": _airbench,
}


def layers(name, model):
    """The Layers of family `name` in call order; `model` is its flax module. InputError for a
    family without names."""
    if name not in FAMILIES:
        raise InputError(f"layers of model {name!r} have no names in PyTorch (weights.FAMILIES)")
    return list(FAMILIES[name](model))


def _to_torch(layer, variable, value):
    """One tensor in PyTorch's layout."""
    if variable != "kernel":
        return value
    if layer.kind != "linear":
        return value.transpose(3, 2, 0, 1)  # [O, I, k, k]
    rows, features = value.shape
    pixels = rows // layer.flattened
    return value.reshape(pixels, layer.flattened, features).transpose(2, 1, 0).reshape(features, -1)


def _to_flax(layer, variable, value):
    """The inverse of _to_torch."""
    if variable != "kernel":
        return value
    if layer.kind != "linear":
        return value.transpose(2, 3, 1, 0)  # [k, k, I, O]
    features, rows = value.shape
    pixels = rows // layer.flattened
    return value.reshape(features, layer.flattened, pixels).transpose(2, 1, 0).reshape(-1, features)


def to_state_dict(name, model, variables, step=0):
    """{PyTorch name: numpy array} of Flax `variables` {params, batch_stats}, dtypes kept.

    `step` becomes BatchNorm's num_batches_tracked.
    """
    state_dict = {}
    for layer in layers(name, model):
        for collection, variable, tensor in VARIABLES[layer.kind]:
            value = variables[collection][layer.flax].get(variable)
            if value is None:
                continue
            parts = np.split(np.asarray(value), len(layer.torch), axis=-1)
            for prefix, part in zip(layer.torch, parts, strict=True):
                converted = _to_torch(layer, variable, part)
                state_dict[f"{prefix}.{tensor}"] = np.ascontiguousarray(converted)
        if layer.kind == "batch_norm":
            for prefix in layer.torch:
                state_dict[f"{prefix}.{COUNTER}"] = np.array(step, np.int64)
    return state_dict


def from_state_dict(name, model, variables, state_dict):
    """Flax variables with the values of `state_dict` {PyTorch name: numpy array}.

    `variables` (arrays or shapes) gives structure, shapes and dtypes. Raises InputError, naming
    them, for tensors that are missing, not known, of another shape or not finite.
    """
    shapes = {
        collection: {
            layer: {key: np.broadcast_to(0, value.shape) for key, value in leaves.items()}
            for layer, leaves in variables.get(collection, {}).items()
        }
        for collection in ("params", "batch_stats")
    }
    _check(state_dict, to_state_dict(name, model, shapes))
    result = {collection: {} for collection in variables}
    for layer in layers(name, model):
        for collection, variable, tensor in VARIABLES[layer.kind]:
            like = variables[collection][layer.flax].get(variable)
            if like is None:
                continue
            parts = [
                _to_flax(layer, variable, np.asarray(state_dict[f"{prefix}.{tensor}"]))
                for prefix in layer.torch
            ]
            value = np.concatenate(parts, axis=-1).astype(like.dtype)
            result[collection].setdefault(layer.flax, {})[variable] = value
    return result


def _check(found, wanted):
    """Raise InputError unless `found` holds the tensors of `wanted`, each of its shape."""
    wanted = {key: value for key, value in wanted.items() if not key.endswith(COUNTER)}
    found = {key: np.asarray(value) for key, value in found.items() if not key.endswith(COUNTER)}
    both = [key for key in wanted if key in found]
    with np.errstate(over="ignore"):  # of float64's; what does not fit is infinite
        found = {
            key: value.astype(np.float32) if value.dtype == np.float64 else value
            for key, value in found.items()
        }
    floating = {key for key in both if jnp.issubdtype(found[key].dtype, jnp.floating)}
    faults = {
        "missing": [key for key in wanted if key not in found],
        "not known to the model": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {list(found[key].shape)} instead of {list(wanted[key].shape)}"
            for key in both
            if found[key].shape != wanted[key].shape
        ],
        "not of floating point": [key for key in both if key not in floating],
        "not finite": [
            key for key in both if key in floating and not np.isfinite(found[key]).all()
        ],
    }
    texts = [f"{', '.join(_few(names))} {fault}" for fault, names in faults.items() if names]
    if texts:
        raise InputError("the weights do not fit the model: " + "; ".join(texts))


def _few(names, most=6):
    return names if len(names) <= most else [*names[:most], f"and {len(names) - most} more"]
