"""The systems in PyTorch: plain torch.nn modules beside the Flax ones, recipes with torch.optim.

The only package that imports torch. The modules follow the same description layer by layer, keep
PyTorch's order [B, C, H, W] and are not derived from the Flax ones, so that each side checks the
other; weights.py knows which tensor is which.
"""

import torch

from cifar_jax.torch_twin.device import move, peak_memory, seed, set_float32, synchronize
from cifar_jax.torch_twin.nets import TWINS, create_twin
from cifar_jax.torch_twin.recipe import DTYPES, Recipe
from cifar_jax.torch_twin.tensors import (
    images_of,
    labels_of,
    load_file,
    load_weights,
    predict,
    save_file,
    weights_of,
)

__all__ = [
    "DTYPES",
    "TWINS",
    "Recipe",
    "create_twin",
    "images_of",
    "labels_of",
    "load_file",
    "load_weights",
    "move",
    "peak_memory",
    "predict",
    "save_file",
    "seed",
    "set_float32",
    "synchronize",
    "torch",
    "weights_of",
]
