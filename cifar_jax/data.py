"""Bytes on disk -> Dataset. CIFAR-10 and CIFAR-100 from their official files, from TFDS without
TensorFlow, or from their home; other sets of TFDS; folders of images; the embedded digits.

Every official file is checked against its md5 before anything in it is interpreted; archives are
read member by member and never extracted; pickles go through a reader that knows only what the
official ones are made of. Whatever the source, the images come in the official order.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import pickle
import re
import tarfile
import threading
from typing import NamedTuple

import jax
import numpy as np
from flax import struct

from cifar_jax import InputError, meant, one_line
from cifar_jax.images import files_of, read_image

SPLITS = ("train", "test")
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclasses.dataclass
class Official:
    """One of the two sets of https://www.cs.toronto.edu/~kriz/cifar.html.

    A file stands as (size in bytes, md5); size None is not known beforehand. Where `archive_md5`
    has that of an archive as a whole, it is checked, else each file in it.
    """

    title: str
    class_names: tuple[str, ...]
    per_class: dict[str, int]  # images, by split
    url: str
    python_folder: str
    python_archive: str
    python_files: dict[str, tuple[int | None, str]]
    label_key: bytes  # of the labels in a python file
    binary_folder: str
    binary_archive: str
    binary_files: dict[str, tuple[int | None, str]]
    label_bytes: int  # of a binary record, the last is the label
    archive_md5: dict[str, str]
    sha256: dict[str, str]  # fingerprint() of the images and labels in order, where it is known


CIFAR10 = Official(
    title="CIFAR-10",
    class_names=tuple(CIFAR10_CLASSES.split()),
    per_class={"train": 5000, "test": 1000},
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    python_folder="cifar-10-batches-py",
    python_archive="cifar-10-python.tar.gz",
    python_files={
        "data_batch_1": (31035704, "c99cafc152244af753f735de768cd75f"),
        "data_batch_2": (31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
        "data_batch_3": (31035999, "54ebc095f3ab1f0389bbae665268c751"),
        "data_batch_4": (31035696, "634d18415352ddfa80567beed471001a"),
        "data_batch_5": (31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
        "test_batch": (31035526, "40351d587109b95175f43aff81a1287e"),
    },
    label_key=b"labels",
    binary_folder="cifar-10-batches-bin",
    binary_archive="cifar-10-binary.tar.gz",
    binary_files={
        "data_batch_1.bin": (30730000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
        "data_batch_2.bin": (30730000, "5ea93a67294ea407fff1d09f752e9692"),
        "data_batch_3.bin": (30730000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
        "data_batch_4.bin": (30730000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
        "data_batch_5.bin": (30730000, "53f37980c15c3d472c316c40844f3f0d"),
        "test_batch.bin": (30730000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
    },
    label_bytes=1,
    archive_md5={},
    sha256={
        "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
        "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
    },
)
# The archives' md5 are those that their home states, the python files' those that torchvision
# checks; the binary files', from one public reader, count in an unpacked folder alone. None of
# these files was at hand here.
CIFAR100 = Official(
    title="CIFAR-100",
    class_names=tuple(CIFAR100_CLASSES.split()),
    per_class={"train": 500, "test": 100},
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    python_folder="cifar-100-python",
    python_archive="cifar-100-python.tar.gz",
    python_files={
        "train": (None, "16019d7e3df5f24257cddd939b257f8d"),
        "test": (None, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
    },
    label_key=b"fine_labels",
    binary_folder="cifar-100-binary",
    binary_archive="cifar-100-binary.tar.gz",
    binary_files={
        "train.bin": (153700000, "6172c7755cfe09b2fe270c85cebc1b15"),
        "test.bin": (30740000, "4499cfba6c016c1be1438163640a0898"),
    },
    label_bytes=2,
    archive_md5={
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    },
    sha256={},
)
OFFICIAL = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# seconds to get an answer from the data's home before the download is given up
NETWORK_TIMEOUT = 8.0
LARGEST = 2**33  # bytes of a split's pixels: all lie in memory, and on every device
UNPACKED = 2**28  # bytes that an official file or archive holds at most
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


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
            official = OFFICIAL[name]
            dataset = _official(name, root, split)
            _check(dataset, official, split)
            return dataset
        about = describe(name, data_dir)
        if name == "folder":
            return _folder(root, about, split)
        return _prepared_set(_tfds_folder(name, root), about, split)
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
            return _describe_folder(root)
        return _describe_prepared(_tfds_folder(name, root))
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


# ---------------------------------------------------------------------------------------- embedded
# digits


def _digits(split):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, enlarged to 32x32x3; of each class every
    6th is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], 0..16 -> 0..255
    images = np.repeat(grey.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    labels = digits.target.astype(np.int32)
    rank = np.zeros(len(labels), int)
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    rows = (rank % 6 == 5) == (split == "test")
    return Dataset(np.ascontiguousarray(images[rows]), labels[rows])


# ------------------------------------------------------------------------------------------------
# CIFAR-10


def _official(name, root, split):
    official = OFFICIAL[name]
    sources = (
        (_python_folder, official.python_folder, next(iter(official.python_files))),
        (_python_archive, official.python_archive, None),
        (_binary_folder, official.binary_folder, next(iter(official.binary_files))),
        (_binary_archive, official.binary_archive, None),
    )
    for read, form, marker in sources:
        for place in (root / form, root):
            if (place / marker).is_file() if marker else place.is_file() and place.name == form:
                return read(place, official, split)
    home = pathlib.Path("~/tensorflow_datasets").expanduser()
    prepared = _prepared(root, name) or _prepared(home, name)
    if prepared is None:
        looked = (
            ", ".join(str(root / form) for _, form, _ in sources)
            + f", {root / name} and {home / name} (TFDS)"
        )
        prepared = _download(name, root, looked)
    return _tfds(prepared, official, split)


def _names(files, split):
    return [name for name in files if name.startswith("test") == (split == "test")]


def _verified(data, path, files):
    """`data` (bytes) if it is the official file of path's name, else InputError."""
    size, md5 = files[path.name]
    if len(data) != (size or len(data)):
        raise InputError(
            f"{path} has {len(data)} bytes where the official file has {size}; get it again"
        )
    if md5 and hashlib.md5(data).hexdigest() != md5:
        raise InputError(f"{path} differs from the official file (md5); get it again")
    return data


def _from_folder(folder, files, split):
    """The split's files, in order, as (bytes, path)."""
    for name in _names(files, split):
        try:
            with open(folder / name, "rb") as file:
                most = files[name][0] or UNPACKED
                data = _verified(file.read(most + 1), folder / name, files)
        except OSError as error:
            raise InputError(f"cannot read {folder / name}: {error.strerror}") from error
        yield data, folder / name


class _Member(tarfile.TarInfo):
    """A header of an archive; what is no regular file (a long name, say) may hold 64 KiB."""

    @classmethod
    def frombuf(cls, *args):
        member = super().frombuf(*args)
        if member.size < 0 or (member.size > 2**16 and not member.isreg()):
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member


def _from_archive(archive, files, split, md5=None):
    """The split's members, in order, as (bytes, path): regular files of the expected name and size
    only. `md5` is the archive's own; without, each member's is checked."""
    if md5:
        with open(archive, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != md5:
                raise InputError(f"{archive} differs from the official file (md5); get it again")
        files = {name: (size, None) for name, (size, _) in files.items()}
    wanted, found, total = _names(files, split), {}, 0
    try:
        with tarfile.open(archive, "r|gz", tarinfo=_Member) as tar:
            for count, member in enumerate(tar):
                if count == 1000:
                    raise InputError(f"{archive} holds more than {count} files; get it again")
                total += member.size
                if total > UNPACKED:
                    raise InputError(
                        f"{archive} unpacks to more than {UNPACKED >> 20} MiB; get it again"
                    )
                name = pathlib.PurePosixPath(member.name).name
                if (
                    name in wanted
                    and name not in found
                    and member.isreg()
                    and member.size == (files[name][0] or member.size)
                ):
                    found[name] = _verified(tar.extractfile(member).read(), archive / name, files)
                if len(found) == len(wanted):
                    break
    except InputError:
        raise
    except Exception as error:  # a hostile archive can raise anything
        raise InputError(f"{archive} is damaged or cut short ({error}); get it again") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{archive} does not hold the official {missing[0]}; get it again")
    return ((found[name], archive / name) for name in wanted)


class _Numpy:
    """Stands in for each numpy name and object of a batch: keeps what it was given, does nothing.

    numpy's own take what a hostile file likes: any size, any memory layout.
    """

    __slots__ = ("args", "state")

    def __init__(self, *args):
        self.args, self.state = args, None

    def __call__(self, *args):
        return _Numpy(*args)

    def __setstate__(self, state):
        self.state = state


class _BatchUnpickler(pickle._Unpickler):
    """Unpickles exactly what the official python batches are made of; anything else is refused,
    nothing runs.

    The unpickler written in Python: its operations can be chosen, and no number in a file makes it
    take memory.
    """

    NAMES = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
    OPERATIONS = """
        PROTO STOP MARK GLOBAL REDUCE BUILD BINPUT LONG_BINPUT BINGET LONG_BINGET
        NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 SHORT_BINSTRING BINSTRING BINUNICODE
        TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    """
    dispatch = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in OPERATIONS.split())
    }

    def find_class(self, module, name):
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"refuses {module}.{name}")
        return _Numpy()


def _unpickle(data, place, label_key=b"labels"):
    """(images [N, 32, 32, 3], labels [N]) of one python batch; InputError if it is anything
    else."""
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        labels = batch[label_key]
        _, shape, dtype, by_columns, pixels = batch[b"data"].state
        if dtype.args[0] not in (b"u1", "u1") or by_columns or type(pixels) is not bytes:
            raise ValueError("the images are not uint8")
        images = np.frombuffer(pixels, np.uint8).reshape(shape)
        if images.shape != (len(labels), 3072):
            raise ValueError(f"images {images.shape}, {len(labels)} labels")
        if type(labels) is not list or any(type(v) is not int for v in labels):
            raise ValueError("the labels are not numbers")
    except Exception as error:  # a hostile pickle can raise anything
        raise InputError(f"{place} is not a CIFAR batch: {error}") from error
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int32)


def _join(batches):
    images, labels = zip(*batches, strict=True)
    return Dataset(
        np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels).astype(np.int32)
    )


def _records(data, label_bytes):
    """(images, labels) of one binary file: records of label bytes and 3 x 32 x 32 pixels."""
    records = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + 3072)
    labels, pixels = records[:, label_bytes - 1], records[:, label_bytes:]
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int32)


def _python_folder(folder, official, split):
    files = _from_folder(folder, official.python_files, split)
    return _join(_unpickle(data, place, official.label_key) for data, place in files)


def _python_archive(archive, official, split):
    md5 = official.archive_md5.get(official.python_archive)
    files = _from_archive(archive, official.python_files, split, md5)
    return _join(_unpickle(data, place, official.label_key) for data, place in files)


def _binary_folder(folder, official, split):
    files = _from_folder(folder, official.binary_files, split)
    return _join(_records(data, official.label_bytes) for data, _ in files)


def _binary_archive(archive, official, split):
    md5 = official.archive_md5.get(official.binary_archive)
    files = _from_archive(archive, official.binary_files, split, md5)
    return _join(_records(data, official.label_bytes) for data, _ in files)


def _check(dataset, official, split):
    """Well formed, and the official images in the official order; InputError if not."""
    classes, each = len(official.class_names), official.per_class[split]
    counts = np.bincount(np.clip(dataset.labels, -1, classes) + 1, minlength=classes + 2)
    shape = (classes * each, 32, 32, 3)
    if dataset.images.shape != shape or dataset.images.dtype != np.uint8:
        found = f"{dataset.images.dtype} {dataset.images.shape}"
        raise InputError(
            f"the {official.title} {split} images are {found}, not uint8 {shape}; "
            "get the data again"
        )
    if list(counts) != [0] + [each] * classes + [0]:
        raise InputError(
            f"the {official.title} {split} labels are not {each} of each class; get the data again"
        )
    known = official.sha256.get(split)
    if known and fingerprint(dataset) != known:
        raise InputError(
            f"the {official.title} {split} images are not the official ones in the official order; "
            "get the data again"
        )


# -------------------------------------------------------------------------------- own images


def _classes(folder):
    """The folders in `folder`, sorted by name, hidden ones left out; InputError without it."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; own data are DIR/train/CLASS/*.png and "
            "DIR/test/CLASS/*.png, DIR named with --config.data.dir"
        )
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def _images(folder):
    """The image files of one class."""
    found = [p for p in files_of(folder) if p.suffix.lower() in SUFFIXES]
    if not found:
        raise InputError(f"{folder} holds no image ({', '.join(SUFFIXES)}); every class needs one")
    return found


def _describe_folder(root):
    names = _classes(root / "train")
    if len(names) < 2:
        raise InputError(f"{root / 'train'} has {len(names)} folders; it needs one for each class")
    return Description(tuple(names), _pixels_of(_images(root / "train" / names[0])[0]).shape)


def _pixels_of(path):
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(f"cannot read {error}") from error


def _folder(root, about, split):
    """root/split/CLASS/*, class by class, each sorted by name."""
    unknown = [name for name in _classes(root / split) if name not in about.class_names]
    if unknown:
        raise InputError(f"{root / split / unknown[0]} is a class that {root / 'train'} has not")
    paths, labels = [], []
    for label, name in enumerate(about.class_names):
        if not (root / split / name).is_dir():
            raise InputError(f"{root / split} lacks the class {name}, which train has")
        found = _images(root / split / name)
        paths += found
        labels += [label] * len(found)
    images = _empty(len(paths), about.image_shape, root / split)
    for i, path in enumerate(paths):
        pixels = _pixels_of(path)
        if pixels.shape != about.image_shape:
            (height, width), (h, w) = pixels.shape[:2], about.image_shape[:2]
            raise InputError(
                f"{path} has {width} x {height} pixels where the first image has {w} x {h}; "
                "all must be of one size: scale them first"
            )
        images[i] = pixels
    return Dataset(images, np.array(labels, np.int32))


def _empty(count, shape, place):
    """Room for so many images; InputError if they are none or too many."""
    size = count * int(np.prod(shape))
    if not 0 < size <= LARGEST:
        raise InputError(
            f"{place} has {count:,} images of {shape[1]} x {shape[0]}, {size / 2**30:.1f} GiB of "
            f"pixels, where up to {LARGEST >> 30} GiB fit"
        )
    return np.empty((count, *shape), np.uint8)


# -------------------------------------------------------------------------------------------- TFDS


def _prepared(root, name):
    """The newest prepared version folder of set `name` under a TFDS data folder (or that folder
    itself), or None."""
    found = [
        info.parent
        for place in (root / name, root)
        for info in sorted(place.glob("*/dataset_info.json"))
        if place.name == pathlib.PurePath(name).name
    ]
    return found[-1] if found else None


def _tfds_folder(name, root):
    """The folder of tfds:NAME or tfds:NAME/CONFIG as prepared; InputError without it."""
    stem = name.removeprefix("tfds:")
    if not re.fullmatch(r"\w+(/[\w.+-]*\w)?", stem):
        raise InputError(f"{name!r} is not tfds:NAME or tfds:NAME/CONFIG")
    home = pathlib.Path("~/tensorflow_datasets").expanduser()
    folder = _prepared(root, stem) or _prepared(home, stem)
    if folder is None:
        raise InputError(
            f"{root / stem} and {home / stem} hold no prepared dataset; where TensorFlow is, "
            f"tfds.builder({stem!r}, data_dir={str(root)!r}, file_format='array_record')"
            ".download_and_prepare() makes it"
        )
    return folder


def _describe_prepared(folder):
    """Class names and image size, from features.json read as data: TFDS's own reader imports
    whatever module it names."""
    try:
        with open(folder / "features.json", "rb") as file:
            features = json.loads(file.read(2**20))["featuresDict"]["features"]
        shape = [int(n) for n in features["image"]["image"]["shape"]["dimensions"]]
        classes = int(features["label"]["classLabel"]["numClasses"])
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f"{folder} is not an image-classification set of TFDS with 'image' and 'label': "
            f"features.json: {type(error).__name__} {error}"
        ) from error
    if len(shape) != 3 or min(shape) < 1 or shape[2] not in (1, 3) or max(shape) > 2**13:
        raise InputError(f"{folder} has images of shape {shape}; they must be of one size")
    names = tuple(str(i) for i in range(classes)) if 1 < classes <= 2**16 else ()
    place = folder / "label.labels.txt"
    if place.is_file():
        with open(place, encoding="utf8", errors="replace") as file:
            lines = file.read(2**22).split("\n")
        names = tuple(one_line(line, 200) for line in lines if line.strip())
    if len(names) != classes or len(names) < 2:
        raise InputError(f"{folder} has {classes} classes and {len(names)} names of classes")
    return Description(names, (shape[0], shape[1], 3))


def _features(about, with_id):
    """What we read of an example of TFDS's image-classification sets."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=about.image_shape),
        "label": tfds.features.ClassLabel(names=about.class_names),
        **({"id": tfds.features.Text()} if with_id else {}),
    }
    return tfds.features.FeaturesDict(features)


def _pixels(encoded, shape):
    """A PNG or JPEG as uint8 of `shape` [H, W, 3]; grey in all three channels."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=["PNG", "JPEG"]) as image:
        if (image.height, image.width) != tuple(shape[:2]) or image.mode not in ("RGB", "L"):
            raise ValueError(f"an image is {image.mode} {image.size}")
        return np.asarray(image.convert("RGB"))


def _examples(folder, about, split, count=None):
    """(ids, images, labels) of a prepared array_record folder, in its order.

    Only its records: TFDS's reader imports whatever module the folder's features.json names.
    InputError unless it can be read. An official set has `count` images, each with an id.
    """
    import tensorflow_datasets as tfds

    features, raw = _features(about, count is not None), {"image": tfds.decode.SkipDecoding()}
    ids, labels = [], []
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        shards = sorted(folder.glob(f"*-{split}.array_record*"))
        if not shards:
            raise ValueError(f"it has no {split} split in array_record files")
        source = ArrayRecordDataSource(shards)
        if len(source) != (count or len(source)):
            raise ValueError(f"{len(source)} images of {split} instead of {count}")
        images = _empty(len(source), about.image_shape, folder)
        for start in range(0, len(source), 1000):
            for record in source.__getitems__(range(start, min(start + 1000, len(source)))):
                example = features.deserialize_example_np(record, decoders=raw)
                images[len(labels)] = _pixels(example["image"], about.image_shape)
                labels.append(np.int32(example["label"]))
                ids.append(example["id"].decode() if count else "")
    except InputError:
        raise
    except Exception as error:  # these readers raise what they like
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder} cannot be read as an array_record TFDS folder: {first}"
        ) from error
    return ids, images, np.array(labels)


def _tfds(folder, official, split):
    """Read an official set as prepared by TFDS (the stock one is shuffled; ids like train_16399
    give the official order)."""
    count = len(official.class_names) * official.per_class[split]
    about = Description(official.class_names, (32, 32, 3))
    ids, images, labels = _examples(folder, about, split, count)
    order = [name.split("_")[-1] for name in ids]
    order = [int(text) if re.fullmatch("[0-9]{1,9}", text) else -1 for text in order]
    if sorted(order) != list(range(count)):
        raise InputError(f"{folder} does not hold each image of {split} once; prepare it again")
    ranks = np.argsort(order)
    return Dataset(images[ranks], labels[ranks])


def _prepared_set(folder, about, split):
    """Any image-classification set of TFDS, in its order; its validation split where it has no
    test split."""
    if split == "test" and not any(folder.glob("*-test.array_record*")):
        split = "validation"
    _, images, labels = _examples(folder, about, split)
    classes = len(about.class_names)
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{folder} has a label of {split} that is not one of its {classes}")
    return Dataset(images, labels)


def _answers(url):
    """None if the address answers within NETWORK_TIMEOUT seconds, else why not."""
    import requests

    outcome = ["no answer"]

    def ask():  # in a thread of its own: a name look-up has no time limit
        try:
            response = requests.head(url, timeout=NETWORK_TIMEOUT / 2, allow_redirects=True)
            outcome[0] = None if response.ok else f"HTTP {response.status_code}"
        except requests.RequestException as error:
            outcome[0] = type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT)
    return outcome[0]


def _download(name, root, looked):
    """Fetch the binary archive from its home and prepare it as TFDS does, in root/NAME/VERSION;
    returns that folder."""
    official = OFFICIAL[name]
    title, url = official.title, official.url
    trouble = _answers(url)
    if trouble:
        raise InputError(
            f"{title} not found (looked for {looked}) and {url} is out of reach ({trouble}): "
            "put any of these files there and name the folder with --config.data.dir=DIR, or run "
            "the embedded default, --config=configs/quickstart.py"
        )
    import tensorflow_datasets as tfds

    class Cifar(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The set as the stock TFDS builder lays it out, but in the official order and without
        TensorFlow."""

        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{title}: 60,000 32x32 colour images.",
                features=_features(Description(official.class_names, (32, 32, 3)), True),
                supervised_keys=("image", "label"),
                homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            archive = pathlib.Path(dl_manager.download(url))
            return {split: self._generate_examples(archive, split) for split in SPLITS}

        def _generate_examples(self, archive, split):
            from PIL import Image

            dataset = _binary_archive(archive, official, split)
            for i, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                yield (
                    i,
                    {"id": f"{split}_{i:05d}", "image": png.getvalue(), "label": int(label)},
                )

    try:
        Cifar.name = name  # which its body could not have taken from here
        builder = Cifar(data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    except InputError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"downloading {title} from {url} into {root} failed: {first}") from error
    return pathlib.Path(builder.data_dir)
