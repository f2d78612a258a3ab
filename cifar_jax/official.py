"""CIFAR-10 and CIFAR-100 as their authors publish them: folders and archives, python and binary.

Every file is checked against its md5 before anything in it is interpreted; archives are read member
by member and never extracted; pickles go through a reader that knows only what the official ones
are made of. Whatever the form, the images come in the official order.
"""

import dataclasses
import hashlib
import io
import pathlib
import pickle
import tarfile

import numpy as np

from cifar_jax import InputError
from cifar_jax.dataset import Dataset, fingerprint

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
UNPACKED = 2**28  # bytes that an official file or archive holds at most


def forms(official):
    """((its reader (place, official, split) -> Dataset, its name, the file that marks a folder)) of
    the forms in which a set can lie on the disk."""
    return (
        (_python_folder, official.python_folder, next(iter(official.python_files))),
        (_python_archive, official.python_archive, None),
        (_binary_folder, official.binary_folder, next(iter(official.binary_files))),
        (binary_archive, official.binary_archive, None),
    )


def find(root, official):
    """(reader, place) of the first of its forms in the folder `root`, or that is `root`; None
    without one."""
    for read, form, marker in forms(official):
        for place in (root / form, root):
            if (place / marker).is_file() if marker else place.is_file() and place.name == form:
                return read, place
    return None


def _names(files, split):
    return [name for name in files if name.startswith("test") == (split == "test")]


def verified(data, path, files):
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
                data = verified(file.read(most + 1), folder / name, files)
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
        if member.type == tarfile.GNUTYPE_SPARSE:  # tarfile reads a list of any length
            raise tarfile.ReadError("a sparse file")
        return member

    def _proc_gnusparse_10(self, *args):
        """Of tarfile, for another such list."""
        raise tarfile.ReadError("a sparse file")


def from_archive(archive, files, split, md5=None):
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
                    found[name] = verified(tar.extractfile(member).read(), archive / name, files)
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


def unpickle(data, place, label_key=b"labels"):
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
    return _join(unpickle(data, place, official.label_key) for data, place in files)


def _python_archive(archive, official, split):
    md5 = official.archive_md5.get(official.python_archive)
    files = from_archive(archive, official.python_files, split, md5)
    return _join(unpickle(data, place, official.label_key) for data, place in files)


def _binary_folder(folder, official, split):
    files = _from_folder(folder, official.binary_files, split)
    return _join(_records(data, official.label_bytes) for data, _ in files)


def binary_archive(archive, official, split):
    md5 = official.archive_md5.get(official.binary_archive)
    files = from_archive(archive, official.binary_files, split, md5)
    return _join(_records(data, official.label_bytes) for data, _ in files)


def check(dataset, official, split):
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
