"""Numpy arrays into the twins and out of them, and .pt files."""

import warnings
import zipfile

import numpy as np
import torch

from cifar_jax import InputError


def _tensors(state_dict):
    """{name: numpy array} as tensors, copies."""
    return {key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}


def load_weights(twin, state_dict):
    """Copy {name: numpy array} into `twin`; every tensor must be there."""
    twin.load_state_dict(_tensors(state_dict), strict=True)


def weights_of(twin):
    """{name: numpy array}, copies, of the twin's state_dict."""
    return {key: value.cpu().numpy().copy() for key, value in twin.state_dict().items()}


def save_file(path, state_dict):
    """Write {name: numpy array} as a .pt file that torch.load(weights_only=True) reads."""
    torch.save(_tensors(state_dict), path)


def load_file(path):
    """{name: numpy array} of a .pt file, a state_dict or {'state_dict': ...}; runs no code in it.

    Raises InputError if the file holds anything but tensors by name.
    """
    size = path.stat().st_size
    try:
        _check_uncompressed(path, size)
        with warnings.catch_warnings(action="ignore"):  # of kinds of tensors refused below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many kinds
        raise InputError(
            f"{path} is not a PyTorch file of tensors alone: {type(error).__name__}"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()
    ):
        raise InputError(f"{path} is not a state_dict: it does not map names to tensors")
    # views of one element may have any shape
    if sum(v.numel() for v in found.values()) > size:
        raise InputError(f"{path} is not a state_dict: its tensors are larger than the file")
    try:
        return {
            key.removeprefix("module."): (v.float() if v.is_floating_point() else v)
            .detach()
            .numpy()
            for key, v in found.items()
        }
    except Exception as error:  # sparse, quantized, without storage, ...
        raise InputError(f"{path} is not a state_dict of dense tensors") from error


def _check_uncompressed(path, size):
    """Raise ValueError for a zip whose members are larger than the file: PyTorch packs nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            if sum(member.file_size for member in members.infolist()) > size:
                raise ValueError("compressed")


def images_of(images, device="cpu", dtype=torch.float32):
    """Numpy [B, H, W, C] as a channels_last tensor [B, C, H, W]."""
    tensor = torch.from_numpy(np.array(images)).to(device, dtype)
    return tensor.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def labels_of(labels, device="cpu"):
    """Numpy int labels [B] as a tensor."""
    return torch.from_numpy(np.asarray(labels).astype(np.int64)).to(device)


def predict(twin, images):
    """Logits [B, num_classes] of images [B, H, W, C], numpy on both ends, in evaluation mode."""
    twin.eval()
    first = next(twin.parameters())
    with torch.inference_mode():
        return twin(images_of(images, first.device, first.dtype)).cpu().numpy()
