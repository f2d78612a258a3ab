"""The model families by name. A model maps images [B, H, W, 3] to logits or log-probabilities
[B, num_classes]."""

import jax.numpy as jnp

from cifar_jax import InputError
from cifar_jax.models.airbench import AirBench
from cifar_jax.models.convnet import ConvNet
from cifar_jax.models.dilated import Dilated
from cifar_jax.models.mixture import Mixture
from cifar_jax.models.resnet import ResNet
from cifar_jax.models.vgg import VGG

MODELS = {
    "vgg": VGG,
    "convnet": ConvNet,
    "resnet": ResNet,
    "mixture": Mixture,
    "dilated": Dilated,
    "airbench": AirBench,
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def create_model(name, *, num_classes, dtype="float32", **kwargs):
    """A flax.linen module of MODELS computing in `dtype` (parameters and statistics stay float32).

    `kwargs` are the family's own fields (widths, dropout, ...). Raises InputError for an unknown
    name, dtype or field.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    try:
        return MODELS[name](num_classes=num_classes, dtype=jnp.dtype(dtype), **kwargs)
    except TypeError as error:
        raise InputError(f"model {name!r}: {str(error).split('() ')[-1]}") from error
