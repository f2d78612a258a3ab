"""Bytes on disk -> Dataset. CIFAR-10 from its official files, from TFDS without TensorFlow, or
from its home.

Every official file is checked against its md5 before anything in it is interpreted; archives are
read member by member and never extracted; pickles go through a reader that knows only what the
official ones are made of. Whatever the source, the images come in the official order.
"""

import hashlib
import io
import pathlib
import pickle
import tarfile
import threading

import jax
import numpy as np
from flax import struct

from cifar_jax import InputError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CLASS_NAMES = {
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    "digits": tuple(str(digit) for digit in range(10)),
}
# (size in bytes, md5) of each official file, by the folder and archive that hold it.
PYTHON_FILES = {
    "data_batch_1": (31035704, "c99cafc152244af753f735de768cd75f"),
    "data_batch_2": (31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
    "data_batch_3": (31035999, "54ebc095f3ab1f0389bbae665268c751"),
    "data_batch_4": (31035696, "634d18415352ddfa80567beed471001a"),
    "data_batch_5": (31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
    "test_batch": (31035526, "40351d587109b95175f43aff81a1287e"),
}
BINARY_FILES = {
    "data_batch_1.bin": (30730000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
    "data_batch_2.bin": (30730000, "5ea93a67294ea407fff1d09f752e9692"),
    "data_batch_3.bin": (30730000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
    "data_batch_4.bin": (30730000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
    "data_batch_5.bin": (30730000, "53f37980c15c3d472c316c40844f3f0d"),
    "test_batch.bin": (30730000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
}
PER_CLASS = {"train": 5000, "test": 1000}
# fingerprint() of the official images and labels in the official order
SHA256 = {
    "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
    "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}
# seconds to get an answer from the data's home before the download is given up
NETWORK_TIMEOUT = 8.0


class Dataset(struct.PyTreeNode):
    """images uint8 [N, H, W, 3], labels int32 [N]; numpy on the host until put on a device."""

    images: jax.Array
    labels: jax.Array

    def __len__(self):
        return self.images.shape[0]


def load(name, data_dir, split):
    """The `split` ('train' or 'test') of 'cifar10' or 'digits' as a Dataset of numpy arrays.

    `data_dir` is the folder that holds CIFAR-10 in any of its forms (or that form itself), and
    where a download goes; 'digits' needs none. Raises InputError, one sentence, for an unknown name
    or split, missing or damaged data.
    """
    if name not in CLASS_NAMES:
        raise InputError(f"unknown dataset {name!r}; choose one of {', '.join(CLASS_NAMES)}")
    if split not in PER_CLASS:
        raise InputError(f"unknown split {split!r}; choose train or test")
    if name == "digits":
        return _digits(split)
    try:
        dataset = _cifar10(pathlib.Path(data_dir).expanduser(), split)
    except (OSError, RuntimeError) as error:  # the latter from expanduser
        raise InputError(f"cannot look for CIFAR-10 in {data_dir}: {error}") from error
    _check(dataset, split)
    return dataset


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
    """sha256 (hex) of all pixels, then all labels as bytes, in order."""
    digest = hashlib.sha256(np.ascontiguousarray(dataset.images))
    digest.update(np.asarray(dataset.labels, np.uint8).tobytes())
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


def _cifar10(root, split):
    sources = (
        (_python_folder, (root / "cifar-10-batches-py", root), "data_batch_1"),
        (_python_archive, (root / "cifar-10-python.tar.gz", root), None),
        (_binary_folder, (root / "cifar-10-batches-bin", root), "data_batch_1.bin"),
        (_binary_archive, (root / "cifar-10-binary.tar.gz", root), None),
    )
    for read, places, marker in sources:
        for place in places:
            if (
                (place / marker).exists()
                if marker
                else place.is_file() and place.name == places[0].name
            ):
                return read(place, split)
    home = pathlib.Path("~/tensorflow_datasets").expanduser()
    prepared = _prepared(root) or _prepared(home)
    if prepared is None:
        looked = (
            ", ".join(str(places[0]) for _, places, _ in sources)
            + f", {root / 'cifar10'} and {home / 'cifar10'} (TFDS)"
        )
        prepared = _download(root, looked)
    return _tfds(prepared, split)


def _names(files, split):
    return [name for name in files if name.startswith("test") == (split == "test")]


def _verified(data, path, files):
    """`data` (bytes) if it is the official file of path's name, else InputError."""
    size, md5 = files[path.name]
    if len(data) != size:
        raise InputError(
            f"{path} has {len(data)} bytes where the official file has {size}; get it again"
        )
    if hashlib.md5(data).hexdigest() != md5:
        raise InputError(f"{path} differs from the official file (md5); get it again")
    return data


def _from_folder(folder, files, split):
    """The split's files, in order, as (bytes, path)."""
    for name in _names(files, split):
        try:
            with open(folder / name, "rb") as file:
                data = _verified(file.read(files[name][0] + 1), folder / name, files)
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


def _from_archive(archive, files, split):
    """The split's members, in order, as (bytes, path): regular files of the expected name and size
    only."""
    wanted, found, total = _names(files, split), {}, 0
    try:
        with tarfile.open(archive, "r|gz", tarinfo=_Member) as tar:
            for count, member in enumerate(tar):
                if count == 1000:
                    raise InputError(f"{archive} holds more than {count} files; get it again")
                total += member.size
                if total > 2**28:
                    raise InputError(
                        f"{archive} unpacks to more than {2**28 >> 20} MiB; get it again"
                    )
                name = pathlib.PurePosixPath(member.name).name
                if (
                    name in wanted
                    and name not in found
                    and member.isreg()
                    and member.size == files[name][0]
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


def _unpickle(data, place):
    """(images [N, 32, 32, 3], labels [N]) of one python batch; InputError if it is anything
    else."""
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        labels = batch[b"labels"]
        _, shape, dtype, by_columns, pixels = batch[b"data"].state
        if dtype.args[0] not in (b"u1", "u1") or by_columns or type(pixels) is not bytes:
            raise ValueError("the images are not uint8")
        images = np.frombuffer(pixels, np.uint8).reshape(shape)
        if images.shape != (len(labels), 3072):
            raise ValueError(f"images {images.shape}, {len(labels)} labels")
        if type(labels) is not list or any(type(v) is not int for v in labels):
            raise ValueError("the labels are not numbers")
    except Exception as error:  # a hostile pickle can raise anything
        raise InputError(f"{place} is not a CIFAR-10 batch: {error}") from error
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int32)


def _join(batches):
    images, labels = zip(*batches, strict=True)
    return Dataset(
        np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels).astype(np.int32)
    )


def _records(data):
    """(images, labels) of one binary file: records of a label byte and 3 x 32 x 32 pixels."""
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(
        np.int32
    )


def _python_folder(folder, split):
    return _join(
        _unpickle(data, place) for data, place in _from_folder(folder, PYTHON_FILES, split)
    )


def _python_archive(archive, split):
    return _join(
        _unpickle(data, place) for data, place in _from_archive(archive, PYTHON_FILES, split)
    )


def _binary_folder(folder, split):
    return _join(_records(data) for data, _ in _from_folder(folder, BINARY_FILES, split))


def _binary_archive(archive, split):
    return _join(_records(data) for data, _ in _from_archive(archive, BINARY_FILES, split))


def _check(dataset, split):
    """Well formed, and the official images in the official order; InputError if not."""
    counts = np.bincount(np.clip(dataset.labels, -1, 10) + 1, minlength=12)
    shape = (10 * PER_CLASS[split], 32, 32, 3)
    if dataset.images.shape != shape or dataset.images.dtype != np.uint8:
        found = f"{dataset.images.dtype} {dataset.images.shape}"
        raise InputError(
            f"the CIFAR-10 {split} images are {found}, not uint8 {shape}; get the data again"
        )
    if list(counts) != [0] + [PER_CLASS[split]] * 10 + [0]:
        raise InputError(
            f"the CIFAR-10 {split} labels are not {PER_CLASS[split]} of each class; "
            "get the data again"
        )
    if fingerprint(dataset) != SHA256[split]:
        raise InputError(
            f"the CIFAR-10 {split} images are not the official ones in the official order; "
            "get the data again"
        )


# -------------------------------------------------------------------------------------------- TFDS


def _prepared(root):
    """The newest prepared version folder of cifar10 under a TFDS data folder (or that folder
    itself), or None."""
    found = [
        info.parent
        for place in (root / "cifar10", root)
        for info in sorted(place.glob("*/dataset_info.json"))
        if place.name == "cifar10"
    ]
    return found[-1] if found else None


def _features():
    """What an example of TFDS's cifar10 holds."""
    import tensorflow_datasets as tfds

    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=CLASS_NAMES["cifar10"]),
    }
    return tfds.features.FeaturesDict(features)


def _pixels(png):
    """A PNG as uint8 [32, 32, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if (image.size, image.mode) != ((32, 32), "RGB"):
            raise ValueError(f"an image is {image.mode} {image.size}")
        return np.asarray(image)


def _tfds(folder, split):
    """Read a prepared array_record folder (the stock one is shuffled; ids like train_16399 give
    the official order).

    Only its records: TFDS's reader imports whatever module the folder's features.json names.
    """
    import tensorflow_datasets as tfds

    features, png = _features(), {"image": tfds.decode.SkipDecoding()}
    count = 10 * PER_CLASS[split]
    order, images, labels = [], [], []
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        source = ArrayRecordDataSource(sorted(folder.glob(f"*-{split}.array_record*")))
        if len(source) != count:
            raise ValueError(f"{len(source)} images of {split} instead of {count}")
        for start in range(0, count, 1000):
            for record in source.__getitems__(range(start, min(start + 1000, count))):
                example = features.deserialize_example_np(record, decoders=png)
                order.append(int(example["id"].decode().split("_")[-1]))
                images.append(_pixels(example["image"]))
                labels.append(np.int32(example["label"]))
    except Exception as error:  # these readers raise what they like
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder} cannot be read as an array_record TFDS folder: {first}"
        ) from error
    if sorted(order) != list(range(count)):
        raise InputError(f"{folder} does not hold each image of {split} once; prepare it again")
    ranks = np.argsort(order)
    return Dataset(np.stack(images)[ranks], np.array(labels)[ranks])


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


def _download(root, looked):
    """Fetch the binary archive from URL and prepare it as TFDS does, in root/cifar10/VERSION;
    returns that folder."""
    trouble = _answers(URL)
    if trouble:
        raise InputError(
            f"CIFAR-10 not found (looked for {looked}) and {URL} is out of reach ({trouble}): "
            "put any of these files there and name the folder with --config.data.dir=DIR, or run "
            "the embedded default, --config=configs/quickstart.py"
        )
    import tensorflow_datasets as tfds

    class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """CIFAR-10 as the stock TFDS builder lays it out, but in the official order and without
        TensorFlow."""

        name = "cifar10"
        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="CIFAR-10: 60,000 32x32 colour images in 10 classes.",
                features=_features(),
                supervised_keys=("image", "label"),
                homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            archive = pathlib.Path(dl_manager.download(URL))
            return {split: self._generate_examples(archive, split) for split in PER_CLASS}

        def _generate_examples(self, archive, split):
            from PIL import Image

            dataset = _binary_archive(archive, split)
            for i, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                yield (
                    i,
                    {"id": f"{split}_{i:05d}", "image": png.getvalue(), "label": int(label)},
                )

    try:
        builder = Cifar10(data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    except InputError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"downloading CIFAR-10 from {URL} into {root} failed: {first}") from error
    return pathlib.Path(builder.data_dir)
