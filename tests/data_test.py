"""Sources of CIFAR-10: made-up files of the official shape everywhere, the real ones where
CIFAR10_DIR names them."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import pathlib
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest

from cifar_jax import InputError, data, official, tfds_reader

N = 20  # images in each made-up file, 2 a class


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the official files."""

    def save_bytes(self, value):
        head = (
            b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        )
        self.write(head + value)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}


def dumps(value):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def python_batch(images, labels):
    """The bytes of a python batch as the official ones are written."""
    flat = np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), 3072))
    return dumps({b"data": flat, b"labels": [int(v) for v in labels], b"batch_label": b"made up"})


def binary_batch(images, labels):
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    return np.concatenate([np.asarray(labels, np.uint8)[:, None], flat], 1).tobytes()


def make_tar(path, folder, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def small(monkeypatch, rng):
    """A made-up CIFAR-10: data's tables set to it; returns its files by form and the expected
    splits."""
    monkeypatch.setattr(official.CIFAR10, "per_class", {"train": 5 * N // 10, "test": N // 10})
    monkeypatch.setenv("HOME", "/nonexistent")
    splits = {}
    python, binary = {}, {}
    for name in official.CIFAR10.python_files:
        images = rng.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
        labels = rng.permutation(np.arange(N) % 10)
        python[name] = python_batch(images, labels)
        binary[f"{name}.bin"] = binary_batch(images, labels)
        splits.setdefault("test" if name == "test_batch" else "train", []).append((images, labels))

    def table(files):
        return {name: (len(b), hashlib.md5(b).hexdigest()) for name, b in files.items()}

    monkeypatch.setattr(official.CIFAR10, "python_files", table(python))
    monkeypatch.setattr(official.CIFAR10, "binary_files", table(binary))
    expected = {s: tuple(np.concatenate(part) for part in zip(*v)) for s, v in splits.items()}
    sha256 = {s: data.fingerprint(data.Dataset(*v)) for s, v in expected.items()}
    monkeypatch.setattr(official.CIFAR10, "sha256", sha256)
    return python, binary, expected


def write_folder(path, files):
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)


def assert_is(dataset, expected):
    np.testing.assert_array_equal(dataset.images, expected[0])
    np.testing.assert_array_equal(dataset.labels, expected[1])
    assert dataset.images.dtype == np.uint8 and dataset.labels.dtype == np.int32


FORMS = ("python folder", "python archive", "binary folder", "binary archive")


def place(form, root, python, binary):
    if form == "python folder":
        write_folder(root / "cifar-10-batches-py", python)
    elif form == "python archive":
        make_tar(root / "cifar-10-python.tar.gz", "cifar-10-batches-py", python)
    elif form == "binary folder":
        write_folder(root / "cifar-10-batches-bin", binary)
    else:
        make_tar(root / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary)
    return next(root.iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_every_official_form_gives_the_same_images(form, small, tmp_path):
    python, binary, expected = small
    itself = place(form, tmp_path, python, binary)
    for split in ("train", "test"):
        assert_is(data.load("cifar10", tmp_path, split), expected[split])
        assert_is(data.load("cifar10", itself, split), expected[split])


@pytest.mark.parametrize("form", FORMS)
def test_cifar100_in_every_official_form(form, rng, tmp_path, monkeypatch):
    """Made-up files: two labels an image, of which the fine one counts; archives by their md5."""
    cifar100 = official.CIFAR100
    monkeypatch.setattr(cifar100, "per_class", {"train": 2, "test": 1})
    python, binary, expected = {}, {}, {}
    for split, count in (("train", 200), ("test", 100)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = rng.permutation(np.arange(count) % 100)
        flat = np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(count, 3072))
        both = {b"coarse_labels": [7] * count, b"fine_labels": [int(v) for v in labels]}
        python[split] = dumps({b"filenames": [b"x"], **both, b"data": flat})
        heads = np.stack([np.full(count, 7), labels], 1).astype(np.uint8)
        binary[f"{split}.bin"] = np.concatenate([heads, flat], 1).tobytes()
        expected[split] = images, labels
    for kind, files in (("python", python), ("binary", binary)):
        table = {name: (None, hashlib.md5(b).hexdigest()) for name, b in files.items()}
        monkeypatch.setattr(cifar100, f"{kind}_files", table)
        name = f"cifar-100-{kind}"
        if form == f"{kind} folder":
            write_folder(tmp_path / name, files)
        elif form == f"{kind} archive":
            archive = tmp_path / f"{name}.tar.gz"
            make_tar(archive, name, files)
            with pytest.raises(
                InputError, match=rf"{name}\.tar\.gz differs from the official file"
            ):
                data.load("cifar100", tmp_path, "train")
            md5 = {archive.name: hashlib.md5(archive.read_bytes()).hexdigest()}
            monkeypatch.setattr(cifar100, "archive_md5", md5)
    for split in data.SPLITS:
        assert_is(data.load("cifar100", tmp_path, split), expected[split])
    assert len(data.describe("cifar100", tmp_path).class_names) == 100


@pytest.mark.case(27)
@pytest.mark.parametrize("damage", ["one bit", "cut short", "longer", "empty", "gone"])
@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_named(form, damage, small, tmp_path):
    python, binary, _ = small
    itself = place(form, tmp_path, python, binary)
    victim = itself
    if itself.is_dir():
        victim = sorted(itself.iterdir())[2]  # not the first: that one says which form this is
    content = bytearray(victim.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 16
    content = {
        "cut short": content[: len(content) // 2],
        "longer": content + b"x" * 7 if itself.is_dir() else content[: len(content) // 3],
        "empty": b"",
    }.get(damage, content)
    if damage == "gone" and itself.is_dir():
        victim.unlink()
    elif damage != "gone":
        victim.write_bytes(bytes(content))
    else:
        make_tar(victim, "cifar-10-batches-py", {"readme.html": b"hello"})
    with pytest.raises(InputError) as caught:
        data.load("cifar10", tmp_path, "train")
    message = str(caught.value)
    assert victim.name in message
    assert "\n" not in message


class Payload:
    """Unpickling this creates the file it names."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.case(29)
def test_a_pickle_that_is_not_what_it_claims_runs_nothing(small, tmp_path, monkeypatch):
    python, _, _ = small
    trap = tmp_path / "ran"
    evil = dumps({b"data": Payload(trap), b"labels": []})
    write_folder(tmp_path / "cifar-10-batches-py", {**python, "data_batch_1": evil})
    with pytest.raises(InputError, match="data_batch_1"):
        data.load("cifar10", tmp_path, "train")
    # and even where its md5 is the expected one
    monkeypatch.setitem(
        official.CIFAR10.python_files, "data_batch_1", (len(evil), hashlib.md5(evil).hexdigest())
    )
    with pytest.raises(InputError, match="refuses .*system"):
        data.load("cifar10", tmp_path, "train")
    assert not trap.exists()


@pytest.mark.case(29)
@pytest.mark.parametrize(
    "value",
    [
        {},
        [1, 2],
        {b"data": np.zeros((3, 5), np.uint8), b"labels": [1, 2, 3]},
        {b"data": np.zeros(3072, "f4"), b"labels": [1]},
    ],
)
def test_pickles_of_another_content_are_refused(value):
    raw = pickle.dumps(value, protocol=2).replace(
        b"numpy._core.multiarray", b"numpy.core.multiarray"
    )
    with pytest.raises(InputError, match="not a CIFAR batch"):
        official.unpickle(raw, "here")


@pytest.mark.case(30)
def test_hostile_archives_write_nothing(small, tmp_path):
    """Paths that climb, links and devices are passed over; a member of the right name must be a
    plain file."""
    python, _, expected = small
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for kind, target in (
            (tarfile.SYMTYPE, "/etc/passwd"),
            (tarfile.LNKTYPE, "x"),
            (tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
            member.type, member.linkname = kind, target
            tar.addfile(member)
        climbing = tarfile.TarInfo("../../../climbed")
        climbing.size = 3
        tar.addfile(climbing, io.BytesIO(b"bad"))
        for name, content in python.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    before = set(pathlib.Path(tmp_path).rglob("*"))
    assert_is(data.load("cifar10", tmp_path, "train"), expected["train"])
    assert set(pathlib.Path(tmp_path).rglob("*")) == before


@pytest.mark.case(30)
@pytest.mark.parametrize("form", ["GNU", "pax"])
def test_a_sparse_file_in_an_archive_is_refused(form, tmp_path):
    """tarfile reads the list of its parts, however long, before it says that there is a file."""
    member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    with tarfile.open(
        tmp_path / "cifar-10-python.tar.gz", "w:gz", format=tarfile.PAX_FORMAT
    ) as tar:
        if form == "GNU":
            member.type = tarfile.GNUTYPE_SPARSE
        else:
            names = {"major": "1", "minor": "0", "name": member.name, "realsize": "512"}
            member.pax_headers = {f"GNU.sparse.{key}": value for key, value in names.items()}
        content = b"1\n0\n0\n".ljust(512, b"\0")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match="a sparse file"):
        data.load("cifar10", tmp_path, "train")


@pytest.mark.case(30)
def test_an_archive_bomb_is_refused(small, tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as tar:
        member = tarfile.TarInfo("cifar-10-batches-py/zeros")
        member.size = 2**28 + 1
        with open("/dev/zero", "rb") as zeros:
            tar.addfile(member, zeros)
    with pytest.raises(InputError, match="unpacks to more than 256 MiB"):
        data.load("cifar10", tmp_path, "train")


@pytest.mark.case(31)
def test_wrong_labels_are_refused(small, tmp_path, monkeypatch):
    python, _, _ = small
    images = np.zeros((N, 32, 32, 3), np.uint8)
    for labels in (np.zeros(N, int), np.arange(N) % 11, np.arange(N) % 10 - 1):
        raw = python_batch(images, labels)
        monkeypatch.setitem(
            official.CIFAR10.python_files, "test_batch", (len(raw), hashlib.md5(raw).hexdigest())
        )
        folder = tmp_path / str(labels.sum())
        write_folder(folder / "cifar-10-batches-py", {**python, "test_batch": raw})
        with pytest.raises(InputError, match="labels are not 2 of each class"):
            data.load("cifar10", folder, "test")


def test_names_are_checked():
    with pytest.raises(InputError, match="unknown dataset 'mnist'; choose one of cifar10, "):
        data.load("mnist", "x", "train")
    with pytest.raises(InputError, match="unknown split 'val'"):
        data.load("digits", "x", "val")


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    train, test = (data.load("digits", "", split) for split in ("train", "test"))
    original = load_digits()
    assert len(train) + len(test) == len(original.target) == 1797
    assert train.images.shape[1:] == (32, 32, 3)
    counts = np.bincount(test.labels)
    assert counts.min() >= 28 and counts.max() <= 31  # stratified
    # every image is one of the originals, enlarged, with its label
    small = np.concatenate([train.images, test.images])[:, ::4, ::4, 0].reshape(1797, 64)
    grey = np.round(original.data * (255 / 16)).astype(np.uint8)
    labels = np.concatenate([train.labels, test.labels])
    assert labelled(small, labels) == labelled(grey, original.target)
    assert data.fingerprint(data.load("digits", "", "train")) == data.fingerprint(train)


def labelled(images, labels):
    """Each image's bytes with its label, sorted."""
    return sorted((x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True))


def test_hold_out_takes_by_seed():
    train = data.load("digits", "", "train")
    rest, validation = data.hold_out(train, 300, seed=1)
    assert (len(rest), len(validation)) == (len(train) - 300, 300)
    again = data.hold_out(train, 300, seed=1)[1]
    np.testing.assert_array_equal(validation.images, again.images)
    assert data.fingerprint(validation) != data.fingerprint(data.hold_out(train, 300, seed=2)[1])
    both = [labelled(part.images, part.labels) for part in (rest, validation)]
    assert sorted(both[0] + both[1]) == labelled(train.images, train.labels)
    with pytest.raises(InputError, match="data.validation must be between"):
        data.hold_out(train, len(train), seed=0)


# ------------------------------------------------------------------------------------------------
# network and TFDS


@contextlib.contextmanager
def serve(folder):
    """A web server on loopback for `folder`; yields its address and the list of paths asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(str(args[0]))

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=folder)
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_download_prepares_a_tfds_folder_and_reads_it_again(small, tmp_path, monkeypatch):
    """The whole path of a user with a network and no data, against a server on this machine."""
    python, binary, expected = small
    (tmp_path / "home").mkdir()
    make_tar(tmp_path / "home" / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary)
    root = tmp_path / "data"
    with serve(tmp_path / "home") as (address, asked):
        monkeypatch.setattr(official.CIFAR10, "url", f"{address}/cifar-10-binary.tar.gz")
        assert_is(data.load("cifar10", root, "train"), expected["train"])
        assert sum("GET" in line for line in asked) == 1
    # now without the server
    for split in ("train", "test"):
        assert_is(data.load("cifar10", root, split), expected[split])
    assert (root / "cifar10" / "3.0.2" / "dataset_info.json").exists()

    # the stock builder's folder is shuffled; ids give the order back
    import tensorflow_datasets as tfds

    features = tfds.builder_from_directory(root / "cifar10" / "3.0.2").info.features
    assert set(features) == {"id", "image", "label"}

    # a damaged folder is named
    for shard in (root / "cifar10" / "3.0.2").glob("*test*array_record*"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(InputError, match=r"3\.0\.2"):
        data.load("cifar10", root, "test")


def test_the_newest_version_is_the_highest_number(tmp_path):
    for version in ("3.0.2", "10.0.0", "9.1.0", "incomplete.X99_10.0.0", "10.0.0.incomplete7"):
        folder = tmp_path / "mnist" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
        (folder / "mnist-train.array_record-00000-of-00001").touch()
    assert tfds_reader.find(tmp_path, "mnist").name == "10.0.0"
    (tmp_path / "mnist" / "11.0.0").mkdir()
    (tmp_path / "mnist" / "11.0.0" / "dataset_info.json").touch()
    (tmp_path / "mnist" / "11.0.0" / "mnist-train.tfrecord-00000-of-00001").touch()
    assert tfds_reader.find(tmp_path, "mnist").name == "10.0.0"


def test_without_a_home_there_is_nothing_in_it(tmp_path, monkeypatch):
    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", expanduser)
    assert tfds_reader.find(tmp_path, "mnist") is None


@pytest.mark.case(28)
def test_a_damaged_download_is_refused(small, tmp_path, monkeypatch):
    _, binary, expected = small
    bad = dict(binary)
    bad["data_batch_3.bin"] = bad["data_batch_3.bin"][:-1] + b"\x00"
    (tmp_path / "home").mkdir()
    make_tar(tmp_path / "home" / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", bad)
    with serve(tmp_path / "home") as (address, _):
        monkeypatch.setattr(official.CIFAR10, "url", f"{address}/cifar-10-binary.tar.gz")
        with pytest.raises(InputError, match=r"data_batch_3\.bin differs from the official file"):
            data.load("cifar10", tmp_path / "data", "train")
        assert not list(tmp_path.glob("data/cifar10/3.0.2/*"))
        make_tar(tmp_path / "home" / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary)
        assert_is(data.load("cifar10", tmp_path / "data", "train"), expected["train"])


def test_a_download_that_another_process_finished_is_taken(small, tmp_path, monkeypatch):
    """Two trainings begun at once on an empty folder: TFDS cannot move its own to the place."""
    _, binary, expected = small
    (tmp_path / "home").mkdir()
    make_tar(tmp_path / "home" / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary)
    root, other = tmp_path / "data", tmp_path / "other"
    with serve(tmp_path / "home") as (address, _):
        monkeypatch.setattr(official.CIFAR10, "url", f"{address}/cifar-10-binary.tar.gz")
        data.load("cifar10", other, "train")
        archive = official.binary_archive

        def meanwhile(*arguments):
            shutil.copytree(other / "cifar10", root / "cifar10", dirs_exist_ok=True)
            return archive(*arguments)

        monkeypatch.setattr(official, "binary_archive", meanwhile)
        assert_is(data.load("cifar10", root, "train"), expected["train"])


@pytest.mark.case(28)
def test_a_download_that_breaks_off_is_never_taken_for_whole(small, tmp_path, monkeypatch):
    """The connection ends half way; the next try, with nothing cleared away, gets it all."""
    _, binary, expected = small
    (tmp_path / "home").mkdir()
    archive = tmp_path / "home" / "cifar-10-binary.tar.gz"
    make_tar(archive, "cifar-10-batches-bin", binary)
    root = tmp_path / "data"
    with serve(tmp_path / "home") as (address, _):
        monkeypatch.setattr(official.CIFAR10, "url", f"{address}/cifar-10-binary.tar.gz")
        with monkeypatch.context() as cut:
            cut.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", half)
            with pytest.raises(InputError, match="failed|damaged"):
                data.load("cifar10", root, "train")
        assert not list(root.glob("cifar10/3.0.2/*"))
        assert_is(data.load("cifar10", root, "train"), expected["train"])


def half(handler, source, out):
    content = source.read()
    out.write(content[: len(content) // 2])


def unreachable():
    """Addresses that do not answer: a closed port, a name that cannot exist, a server that accepts
    and is silent, one that does not speak TLS."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        closed = s.getsockname()[1]
    yield f"http://127.0.0.1:{closed}/x.tar.gz", None
    yield "http://no-such-host.invalid/x.tar.gz", None
    silent = socket.create_server(("127.0.0.1", 0))
    yield f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar.gz", silent
    with serve(".") as (address, asked):
        yield f"{address.replace('http', 'https')}/README.md", None
        assert not any("GET" in line for line in asked)  # it is not asked again without TLS


@pytest.mark.case(32)
def test_without_network_it_gives_up_in_ten_seconds_and_says_what_to_do(
    small, tmp_path, monkeypatch
):
    for address, server in unreachable():
        monkeypatch.setattr(official.CIFAR10, "url", address)
        start = time.monotonic()
        with pytest.raises(InputError) as caught:
            data.load("cifar10", tmp_path, "train")
        assert time.monotonic() - start < 10
        message = str(caught.value)
        for part in (
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            "cifar-10-batches-bin",
            "--config.data.dir",
        ):
            assert part in message
        assert "cifar-10-binary.tar.gz" in message and "configs/quickstart.py" in message
        if server:
            server.close()


def test_tensorflow_is_never_imported():
    code = (
        "import sys, tensorflow_datasets as tfds; from cifar_jax import data, train;"
        "data.load('digits', '', 'train');"
        "print('tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# ----------------------------------------------------------------------------------- the real data


@pytest.mark.cifar10
@pytest.mark.parametrize(
    "form",
    [
        "python folder",
        pytest.param("python archive", marks=pytest.mark.long),
        "binary folder",
        "binary archive",
    ],
)
def test_official_data_in_every_form(form, cifar10_dir, tmp_path):
    """The binary files made here from the python ones are the official ones, byte for byte (their
    md5 is checked)."""
    source = cifar10_dir / "cifar-10-batches-py"
    python = {name: (source / name).read_bytes() for name in official.CIFAR10.python_files}
    binary = {}
    if form.startswith("binary"):
        for name, content in python.items():
            images, labels = official.unpickle(content, name)
            binary[f"{name}.bin"] = binary_batch(images, labels)
    if form == "python folder":
        root = cifar10_dir
    else:
        root = tmp_path
        place(form, root, python, binary)
    train, test = (data.load("cifar10", root, split) for split in ("train", "test"))
    assert data.fingerprint(train) == official.CIFAR10.sha256["train"]
    assert data.fingerprint(test) == official.CIFAR10.sha256["test"]
    assert [official.CIFAR10.class_names[label] for label in train.labels[:5]] == [
        "frog",
        "truck",
        "truck",
        "deer",
        "automobile",
    ]


@pytest.mark.cifar10
@pytest.mark.long
def test_official_data_through_tfds(cifar10_dir, tmp_path, monkeypatch):
    """Download of the whole binary archive from a local server, prepared and read back: the same
    images in order."""
    python = {
        n: (cifar10_dir / "cifar-10-batches-py" / n).read_bytes()
        for n in official.CIFAR10.python_files
    }
    binary = {
        f"{n}.bin": binary_batch(*official.unpickle(content, n)) for n, content in python.items()
    }
    monkeypatch.setenv("HOME", "/nonexistent")
    (tmp_path / "home").mkdir()
    with tarfile.open(tmp_path / "home" / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        for name, content in binary.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with serve(tmp_path / "home") as (address, _):
        monkeypatch.setattr(official.CIFAR10, "url", f"{address}/cifar-10-binary.tar.gz")
        train, test = (
            data.load("cifar10", tmp_path / "data", split) for split in ("train", "test")
        )
    assert data.fingerprint(train) == official.CIFAR10.sha256["train"]
    assert data.fingerprint(test) == official.CIFAR10.sha256["test"]
