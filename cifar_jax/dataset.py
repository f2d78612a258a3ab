"""What a dataset is, wherever it comes from."""

import hashlib
from typing import NamedTuple

import jax
import numpy as np
from flax import struct

from cifar_jax import InputError

SPLITS = ("train", "test")
LARGEST = 2**33  # bytes of a split's pixels: all lie in memory, and on every device


class Description(NamedTuple):
    """What a network must know of a dataset."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # H, W, 3


class Dataset(struct.PyTreeNode):
    """images uint8 [N, H, W, 3], labels int32 [N]; numpy on the host until put on a device."""

    images: jax.Array
    labels: jax.Array

    def __len__(self):
        return self.images.shape[0]


def hold_out(dataset, size, seed):
    """Split off `size` examples drawn by `seed`: (the rest, the validation set), both in their old
    order."""
    if not 0 < size < len(dataset):
        raise InputError(
            f"data.validation must be between 1 and {len(dataset) - 1} images, not {size}"
        )
    chosen = np.zeros(len(dataset), bool)
    chosen[np.random.default_rng(seed).permutation(len(dataset))[:size]] = True
    return tuple(Dataset(dataset.images[rows], dataset.labels[rows]) for rows in (~chosen, chosen))


def fingerprint(dataset):
    """sha256 (hex) of all pixels, then all labels, in order: as bytes, beyond 255 as int32."""
    digest = hashlib.sha256(np.ascontiguousarray(dataset.images))
    labels = np.asarray(dataset.labels)
    digest.update(labels.astype(np.uint8 if labels.max() < 256 else "<i4").tobytes())
    return digest.hexdigest()


def room_for(count, shape, place):
    """Room for so many images; InputError if they are none or too many."""
    size = count * int(np.prod(shape))
    if not 0 < size <= LARGEST:
        raise InputError(
            f"{place} has {count:,} images of {shape[1]} x {shape[0]}, {size / 2**30:.1f} GiB of "
            f"pixels, where up to {LARGEST >> 30} GiB fit"
        )
    return np.empty((count, *shape), np.uint8)
