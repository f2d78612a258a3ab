"""Bytes on disk -> Dataset: official sets, those of TFDS, folders of images, the embedded digits.

Where each is read: official.py, tfds_reader.py, images.py.
"""

import importlib.util
import pathlib

import numpy as np

from cifar_jax import InputError, images, meant, official, tfds_reader
from cifar_jax.dataset import SPLITS, Dataset, Description, fingerprint, hold_out
from cifar_jax.official import OFFICIAL

__all__ = ["SPLITS", "Dataset", "Description", "describe", "fingerprint", "hold_out", "load"]


def load(name, data_dir, split):
    """The `split` ('train' or 'test') of dataset `name` as a Dataset of numpy arrays.

    `name` is cifar10, cifar100, digits, folder or tfds:NAME; `data_dir` the folder that holds it:
    an official set in any of its forms (or that form itself), where a download goes too; train/
    and test/ with a folder a class; or a TFDS data folder. 'digits' needs none. Raises InputError,
    one sentence, for an unknown name or split, missing or damaged data.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose train or test")
    root = _root(name, data_dir)
    try:
        if name == "digits":
            return _digits(split)
        if name in OFFICIAL:
            dataset = _official(name, root, split)
            official.check(dataset, OFFICIAL[name], split)
            return dataset
        about = describe(name, data_dir)
        if name == "folder":
            return images.read_folder(root, about, split)
        return tfds_reader.read(tfds_reader.folder_of(name, root), about, split)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot look for {name} in {data_dir}: {error}") from error


def describe(name, data_dir):
    """The Description of dataset `name`, with as little of its files read as need be; the errors
    are those of load."""
    root = _root(name, data_dir)
    if name == "digits":
        return Description(tuple(str(digit) for digit in range(10)), (32, 32, 3))
    if name in OFFICIAL:
        return Description(OFFICIAL[name].class_names, (32, 32, 3))
    try:
        if name == "folder":
            return images.describe_folder(root)
        return tfds_reader.describe(tfds_reader.folder_of(name, root))
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot look for {name} in {data_dir}: {error}") from error


def _root(name, data_dir):
    """The folder's path, if there is such a dataset at all."""
    if name not in (*OFFICIAL, "digits", "folder") and not str(name).startswith("tfds:"):
        known = [*OFFICIAL, "digits", "folder"]
        raise InputError(
            f"unknown dataset {name!r}; choose one of {', '.join(known)} or tfds:NAME"
            + meant(name, known)
        )
    try:
        return pathlib.Path(data_dir).expanduser()
    except RuntimeError as error:
        raise InputError(f"cannot look for {name} in {data_dir}: {error}") from error


def _digits(split):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, enlarged to 32x32x3; of each class every
    6th is for testing."""
    # its file, for to import it takes a second
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
    table = np.loadtxt(f"{package}/datasets/data/digits.csv.gz", delimiter=",", dtype=np.int32)
    levels, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    grey = np.round(levels * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    pixels = np.repeat(grey.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    rank = np.zeros(len(labels), int)
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    rows = (rank % 6 == 5) == (split == "test")
    return Dataset(np.ascontiguousarray(pixels[rows]), labels[rows])


def _official(name, root, split):
    which = OFFICIAL[name]
    found = official.find(root, which)
    if found:
        read, place = found
        return read(place, which, split)
    folder = tfds_reader.find(root, name)
    if folder is None:
        forms = ", ".join(str(root / form) for _, form, _ in official.forms(which))
        looked = f"{forms}, {root / name} and {tfds_reader.home() / name} (TFDS)"
        folder = tfds_reader.download(name, root, looked)
    return tfds_reader.read_official(folder, which, split)
