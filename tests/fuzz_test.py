"""Mutated inputs: every reader gives right data or one InputError, a flag exit code 2.

Each reader sees FUZZ_EXAMPLES of them, here CI's share; all 10,000, and what they gave as JSON:

    FUZZ_EXAMPLES=10000 FUZZ_RESULT=results/fuzz.json python -m pytest -n 0 tests/fuzz_test.py

None may run code, take longer than SECONDS or more resident memory than BOUND beyond the input's
size (an image: what its pixels need). metrics.jsonl is not here: no reader of it is in the program.
"""

import contextlib
import gc
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib

import jax
import numpy as np
import pytest
import torch
from absl.testing import flagsaver
from checkpoint_test import saved, state_at, sums
from data_test import assert_is, dumps, python_batch, small  # noqa: F401
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save as safetensors_bytes

import main
from cifar_jax import InputError, data, images, official, tfds_reader, weights, workdir
from cifar_jax.checkpoint import Checkpoints, _checksum_of_json
from cifar_jax.exchange import read_weights
from cifar_jax.models import create_model
from cifar_jax.provenance import environment
from configs.quickstart import get_config

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
SECONDS = 30  # of an example; it shares the machine
BOUND = 256 << 20  # bytes of resident memory, beyond the input's size
OUTCOMES = {}  # reader: what its inputs gave


# ------------------------------------------------------------------------------------------------
# what holds of every input


class Hang(BaseException):
    """Not an Exception: no reader may catch it."""


class Watch:
    """Runs one input at a time under the limits; `canary` is the file that hostile inputs make."""

    FORBIDDEN = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen"}
    FORBIDDEN |= {"pty.spawn", "webbrowser.open", "socket.connect"}

    def __init__(self, folder):
        self.canary, self.active, self.ran = folder / "canary", False, []
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self.active and event in self.FORBIDDEN:
            self.ran.append(event)

    def __call__(self, reader, read, size=0, bound=BOUND):
        """What `read()` returns, None if it refuses the input with one line."""
        record = OUTCOMES[reader]
        record["reads"] += 1
        before = resident(reset=True)
        start = time.perf_counter()
        self.active = True
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            value = read()
        except InputError as error:
            value, message = None, str(error)
            assert message.isprintable() and 0 < len(message) <= 2000, message
            record["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.active = False
        record["slowest_seconds"] = max(record["slowest_seconds"], time.perf_counter() - start)
        taken = resident() - before - size
        record["peak_bytes"] = max(record["peak_bytes"], taken)
        assert taken <= bound, f"{taken >> 20} MiB"
        assert not self.ran and not self.canary.exists(), "it ran code"
        return value


def resident(reset=False):
    """Bytes of the largest resident set, since the last reset where the kernel can do that."""
    with contextlib.suppress(OSError):
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    def stop(signum, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    # the measured bound is BOUND; this one saves the machine from what breaks it
    resource.setrlimit(resource.RLIMIT_AS, (now + (8 << 30), limits[1]))
    gc.freeze()  # a failed restore collects garbage: not what has been imported
    yield Watch(tmp_path_factory.mktemp("fuzz"))
    gc.unfreeze()
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)
    if "FUZZ_RESULT" in os.environ:
        limits = {"seconds": SECONDS, "bytes": BOUND, "bytes_of_an_image": IMAGE_BOUND}
        before = workdir.read_json(os.environ["FUZZ_RESULT"]) or {}  # of the other readers
        commit = environment()["commit"]
        readers = before.get("readers", {})
        for reader, outcome in OUTCOMES.items():
            readers[reader] = {**in_all(readers.get(reader, {}), outcome), "commit": commit}
        found = {"limits": limits, "readers": readers, **environment()}
        workdir.write_json(os.environ["FUZZ_RESULT"], found)


def in_all(before, now):
    """The figures of a reader over all runs: sums, but for what is the largest."""
    largest = {key: max(before.get(key, 0), now[key]) for key in ("slowest_seconds", "peak_bytes")}
    added = ("inputs", "reads", "refused", "seconds")
    return {**now, **{key: before.get(key, 0) + now[key] for key in added}, **largest}


def fuzz(reader, inputs, check, once_failed=None):
    """`check` EXAMPLES of `inputs`, and before them {what went wrong: input} of those that once
    failed."""
    once_failed = once_failed or {}
    record = {"inputs": 0, "reads": 0, "refused": 0, "slowest_seconds": 0.0, "peak_bytes": 0}
    OUTCOMES[reader] = record

    @settings(
        max_examples=EXAMPLES,
        deadline=None,  # Watch has its own, which also ends what hangs
        derandomize=EXAMPLES < 1000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(value):
        record["inputs"] += 1
        check(value)

    for value in once_failed.values():
        run = example(value)(run)
    record["once_failed"] = [*once_failed]
    start = time.perf_counter()
    try:
        run()
    finally:
        record["seconds"] = time.perf_counter() - start


# ------------------------------------------------------------------------------------------------
# mutations

EXTREMES = [
    b"\x00" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\x7f",
    b"-1",
    b"\n",
]


@st.composite
def mutated(draw, content, most=4):
    """`content` (bytes) after up to `most` edits, most of them near its ends."""
    for _ in range(draw(st.integers(1, most))):
        size = len(content)
        near = st.integers(0, min(300, len(content)))
        at = draw(near | near.map(lambda i, size=size: size - i) | st.integers(0, len(content)))
        end = at + draw(st.sampled_from([1, 2, 4, 8, 30, 512, len(content)]))
        kind = draw(
            st.sampled_from(
                ["flip", "flip", "flip", "set", "cut", "insert", "delete", "double", "swap"]
            )
        )
        if kind == "flip":
            flipped = bytes(v ^ (1 << draw(st.integers(0, 7))) for v in content[at : at + 1])
            content = content[:at] + flipped + content[at + 1 :]
        elif kind == "set":
            value = draw(st.sampled_from(EXTREMES) | st.binary(min_size=1, max_size=8))
            content = content[:at] + value + content[at + len(value) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            value = draw(st.sampled_from(EXTREMES) | st.binary(max_size=40))
            content = content[:at] + value + content[at:]
        elif kind == "delete":
            content = content[:at] + content[end:]
        elif kind == "double":
            content = content[:end] + content[at:]
        else:
            far = end + (end - at)
            content = content[:at] + content[end:far] + content[at:end] + content[far:]
    return content


ODD = [None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, 5e-324, math.nan, math.inf, "", "x", "\x00"]
ODD += [
    "a\nb",
    "\x1b[2J",
    "../..",
    "/dev/zero",
    "9" * 5000,
    "x" * 10_000,
    [],
    {},
    [[]],
    [None],
    {"": 0},
]
DEEP = "@deep@"  # becomes JSON nested this deep
DEPTHS = [300, 499, 700, 990, 100_000]


def paths(value, before=()):
    """The path of every value inside a JSON value."""
    yield before
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*before, key))


@st.composite
def mutated_json(draw, value, sign=lambda value: value):
    """The text of a JSON value with some of its values changed, lost, renamed; then `sign`ed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([p for p in paths([value]) if p]))
        inside = whole = [value]
        for key in way:
            inside = inside[key]
        kind = draw(st.sampled_from(["change", "change", "change", "lose", "rename"]))
        if kind == "change" or not isinstance(inside, dict):
            odd = st.sampled_from([*ODD, DEEP, *whole]) | st.text() | st.integers() | st.floats()
            inside[last] = json.loads(json.dumps(draw(odd)))
        elif kind == "lose":
            del inside[last]
        else:
            inside[draw(st.text() | st.sampled_from(["__class__", "a.b", "a\nb"]))] = inside.pop(
                last
            )
        value = whole[0]
    text = json.dumps(sign(value))
    left, right = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
    depth = draw(st.sampled_from(DEPTHS))
    return text.replace(f'"{DEEP}"', left * depth + "0" + right * depth).encode()


# ------------------------------------------------------------------------------------------------
# pickles


class Calls:
    """Pickled, a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles(canary):
    """Pickles that would make the file `canary`."""
    calls = [Calls(os.system, f"touch {canary}"), Calls(exec, f"open({str(canary)!r}, 'w')")]
    calls += [Calls(open, str(canary), "w"), Calls(eval, f"open({str(canary)!r}, 'w')")]
    for call in calls:
        for protocol in (0, 2, 4):
            yield pickle.dumps({b"data": call, b"labels": [call]}, protocol)
            yield pickle.dumps(call, protocol)


def batch(images=2):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 32, 32, 3), np.uint8)
    return python_batch(pixels, np.arange(images) % 10)


@st.composite
def mutated_pickle(draw, seeds):
    """A pickle after operations were inserted, lost or doubled, or its bytes edited."""
    content = draw(st.sampled_from(seeds))
    if draw(st.booleans()):
        return draw(mutated(content))
    starts = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    parts = [content[a:b] for a, b in zip(starts, starts[1:])]
    code = st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes])
    argument = st.sampled_from(
        [b"", b"\x00", b"\x02", b"\xff\xff\xff\x07", b"\xff" * 8, struct.pack("<Q", 2**33)]
        + [b"os\nsystem\n", b"numpy\nndarray\n", b"numpy\ndtype\n", b"builtins\nexec\n", b"9" * 99]
    )
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(parts) - 1))
        kind = draw(st.sampled_from(["insert", "insert", "lose", "double", "swap"]))
        if kind == "insert":
            parts.insert(at, draw(code) + draw(argument | st.binary(max_size=9)))
        elif kind == "lose" and len(parts) > 1:
            del parts[at]
        elif kind == "double":
            parts.insert(at, parts[draw(st.integers(0, len(parts) - 1))])
        else:
            other = draw(st.integers(0, len(parts) - 1))
            parts[at], parts[other] = parts[other], parts[at]
    return b"".join(parts)


def laughs(depth=40):
    """Labels of a list of two lists of two lists ...: 2**depth of them from a few bytes."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": value})


def test_pickles(watch):
    def check(content):
        found = watch("pickles", lambda: official.unpickle(content, "here"), len(content))
        if found is not None:
            images, labels = found
            assert images.dtype == np.uint8 and labels.dtype == np.int32
            assert images.shape == (len(labels), 32, 32, 3)

    endless = []
    endless.extend([endless, endless])
    labels = {b"data": np.zeros((1, 3072), np.uint8), b"labels": endless}
    fuzz(
        "pickles",
        mutated_pickle([batch()] * 20 + list(hostile_pickles(watch.canary))),
        check,
        {
            "memory: a memo index of 2**27": b"\x80\x02}r\xff\xff\xff\x07.",
            "memory and time: labels that double 40 times": laughs(),
            "time: labels that hold themselves": dumps(labels),
            "memory: an array of 2**30 bytes": b"cnumpy\nndarray\n(J\x00\x00\x00@tR.",
        },
    )


# ------------------------------------------------------------------------------------------------
# archives


def tar_of(members, format=tarfile.GNU_FORMAT, prefix="cifar-10-batches-py/"):
    """An uncompressed archive; `members` are (name, content, type)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(prefix + name)
            member.size, member.type = len(content), kind
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def header(kind, size, name="x"):
    """One header of an archive, valid but for what it says."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@st.composite
def mutated_tar(draw, seeds):
    """A .tar.gz: fields of headers set (their checksum made right), bytes edited before or after
    compression."""
    content = draw(st.sampled_from(seeds))
    how = draw(st.sampled_from(["fields", "fields", "tar", "gzip"]))
    if how == "fields":
        blocks = [content[i : i + 512] for i in range(0, len(content), 512)]
        heads = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
        for _ in range(draw(st.integers(1, 3))):
            head = bytearray(blocks[draw(st.sampled_from(heads))])
            place, width = draw(
                st.sampled_from([(0, 100), (124, 12), (124, 12), (156, 1), (345, 155)])
            )
            value = draw(
                st.sampled_from(
                    [b"", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777", b"0", b"10"]
                )
                | st.sampled_from(
                    [b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"3", b"5", b"6", b"7"]
                )
                | st.sampled_from(
                    [b"data_batch_1", b"test_batch", b"../../etc/passwd", b"/x/data_batch_1"]
                )
                | st.binary(max_size=12)
            )
            head[place : place + width] = value[:width].ljust(width, b"\x00")
            head[148:156] = b" " * 8
            head[148:156] = b"%06o\x00 " % sum(head)
            blocks[draw(st.sampled_from(heads))] = bytes(head)
        content = b"".join(blocks)
    elif how == "tar":
        content = draw(mutated(content))
    packed = gzip.compress(content, 1, mtime=0)
    return draw(mutated(packed)) if how == "gzip" else packed


def test_archives(watch, tmp_path):
    parts = {"data_batch_1": batch(1), "data_batch_2": batch(2), "test_batch": batch(3)}
    files = {name: (len(b), hashlib.md5(b).hexdigest()) for name, b in parts.items()}
    expected = [parts["data_batch_1"], parts["data_batch_2"]]
    members = [(name, content, tarfile.REGTYPE) for name, content in parts.items()]
    long = [("d" * 200 + "/é" + name, content, kind) for name, content, kind in members]
    links = [("data_batch_1", b"", tarfile.SYMTYPE), ("../up", b"x", tarfile.REGTYPE), *members]
    seeds = [tar_of(members), tar_of(links), tar_of(long), tar_of(long, tarfile.PAX_FORMAT)]
    archive = tmp_path / "x.tar.gz"

    def check(content):
        archive.write_bytes(content)
        read = lambda: [b for b, _ in official.from_archive(archive, files, "train")]  # noqa: E731
        found = watch("archives", read, len(content))
        assert found is None or found == expected
        assert [*tmp_path.iterdir()] == [archive]

    def packed(*content):
        return gzip.compress(b"".join(content), 1)

    zeros = bytes(1 << 20)
    fuzz(
        "archives",
        mutated_tar(seeds),
        check,
        {
            "memory: 400,000 empty files": packed(header(b"0", 0) * 400_000),
            "memory: a name of 200 MiB": packed(header(b"L", 200 << 20), zeros * 200),
            "memory: attributes of 200 MiB": packed(header(b"x", 200 << 20), zeros * 200),
            "traceback: headers of headers": packed((header(b"L", 1) + zeros[:512]) * 2000),
        },
    )


# ------------------------------------------------------------------------------------------------
# folders: what is behind the md5 of a file


PLACES = ("content", "content", "content", "gone", "a folder", "a link to itself", "endless")


def spoil(path, how, content):
    """Put something else in the place of a file."""
    path.unlink()
    if how == "content":
        path.write_bytes(content)
    elif how == "a folder":
        path.mkdir()
    elif how == "a link to itself":
        path.symlink_to(path)
    elif how == "endless":
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("form", ["python", "binary"])
def test_folders(form, watch, small, tmp_path, monkeypatch):  # noqa: F811
    python, binary, expected = small
    files = python if form == "python" else binary
    folder = tmp_path / ("cifar-10-batches-py" if form == "python" else "cifar-10-batches-bin")

    def verified(content, path, files):  # the size alone
        if len(content) != files[path.name][0]:
            raise InputError(f"{path} has another size")
        return content

    monkeypatch.setattr(official, "verified", verified)
    names = st.sampled_from([name for name in files if not name.startswith("data_batch_1")])

    @st.composite
    def inputs(draw):
        name, how = draw(names), draw(st.sampled_from(PLACES))
        content = draw(mutated(files[name])) if how == "content" else b""
        if draw(st.booleans()):  # past the size as well
            content = content[: len(files[name])].ljust(len(files[name]), b"\x00")
        return name, how, content

    def check(value):
        name, how, content = value
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for other in files:
            (folder / other).write_bytes(files[other])
        spoil(folder / name, how, content)
        for split in ("train", "test"):
            found = watch(f"{form} folder", lambda s=split: data.load("cifar10", tmp_path, s))
            if found is not None:
                assert_is(found, expected[split])

    fuzz(f"{form} folder", inputs(), check)


def test_names_of_folders(watch, tmp_path):
    (tmp_path / "closed").write_text("a file")

    def check(name):
        reader = "names of folders"
        assert watch(reader, lambda: data.load("cifar10", name, "test")) is None
        assert watch(reader, lambda: workdir.finished_result(name, {})) is None
        assert watch(reader, lambda: read_weights(name)) is None
        assert watch(reader, lambda: images.read_image(name)) is None
        found = watch(reader, lambda: workdir.existing(name))
        assert found is None or found.is_dir()

    part = st.sampled_from(
        ["..", "~", "~no-such-user", "closed", "x" * 300, "é", "a\nb", "$HOME", "*", "?"]
    )
    names = st.lists(part | st.text(st.characters(exclude_characters="\x00/")), min_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_reader, "answers", lambda url: "no network")
        patch.setenv("HOME", str(tmp_path))
        patch.chdir(tmp_path)
        fuzz(
            "names of folders",
            names.map("/".join).map(lambda name: name.lstrip("/") or "."),
            check,
            {
                "traceback: the home of nobody": "~no-such-user/x",
                "traceback: a long name": "x" * 300,
            },
        )


# ------------------------------------------------------------------------------------------------
# TFDS


def png_of(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def huge_png(width, height):
    """The few bytes of a PNG of one colour."""

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes((3 * width + 1) * min(height, 2000)))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def shard_of(records, path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


def test_tfds(watch, tmp_path, monkeypatch):
    monkeypatch.setattr(official.CIFAR10, "per_class", {"train": 1, "test": 1})
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    pngs = [png_of(image) for image in images]
    about = data.describe("cifar10", "")
    features, folder = tfds_reader.features_of(about, True), tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    shard = folder / "cifar10-test.array_record-00000-of-00001"

    def record(i, png, name=None):
        name = (name or f"test_{i:05d}").encode()
        return features.serialize_example({"id": name, "image": png, "label": i % 10})

    records = [record(i, png) for i, png in enumerate(pngs)]
    whole = shard_of(records, shard)

    @st.composite
    def inputs(draw):
        """(file's bytes, None) or (None, its records)."""
        how = draw(st.sampled_from(["file", "record", "png", "id", "number"]))
        if how == "file":
            return draw(mutated(whole)), None
        i, changed = draw(st.integers(0, 9)), list(records)
        if how == "record":
            changed[i] = draw(mutated(records[i]))
        elif how == "png":
            changed[i] = record(i, draw(mutated(pngs[i])))
        elif how == "id":
            changed[i] = record(
                i, pngs[i], draw(st.text() | st.sampled_from(["test_3", "9" * 5000]))
            )
        else:
            changed = changed[: draw(st.integers(0, 9))] * draw(st.integers(0, 3))
        return None, changed

    def check(value):
        content, changed = value
        if content is None:
            shard_of(changed, shard)
        else:
            shard.write_bytes(content)
        found = watch(
            "TFDS",
            lambda: tfds_reader.read_official(folder, official.CIFAR10, "test"),
            shard.stat().st_size,
        )
        if found is not None:
            assert found.images.shape == (10, 32, 32, 3) and found.images.dtype == np.uint8
            assert found.labels.shape == (10,) and found.labels.dtype == np.int32
            if content is not None:
                np.testing.assert_array_equal(found.images, images)

    # it would import what is named here: this one opens a browser
    features_json = {"pythonClassName": "antigravity.Image"}
    (folder / "features.json").write_text(json.dumps(features_json))
    (folder / "dataset_info.json").write_text('{"splits": [{"shardLengths": ["1000000000000"]}]}')
    once_failed = {
        "memory: an image of 13,000 x 13,000": (
            None,
            [record(0, huge_png(13_000, 13_000)), *records[1:]],
        ),
        "traceback: images of different sizes": (None, [record(0, huge_png(31, 32)), *records[1:]]),
        "traceback: no images": (None, []),
    }
    fuzz("TFDS", inputs(), check, once_failed)
    assert "antigravity" not in sys.modules
    shard_of(records, shard)
    np.testing.assert_array_equal(
        tfds_reader.read_official(folder, official.CIFAR10, "test").images, images
    )


def test_features_of_tfds(watch, tmp_path):
    """features.json of a set named by its user, and the names of its classes."""
    (tmp_path / "features.json").touch()
    image = {"image": {"shape": {"dimensions": ["28", "28", "1"]}, "dtype": "uint8"}}
    features = {"image": image, "label": {"classLabel": {"numClasses": "3"}}}
    features = {"featuresDict": {"features": features}}
    names = st.one_of(st.none(), mutated(b"a\nb\nc\n"))

    def check(value):
        content, labels = value
        (tmp_path / "features.json").write_bytes(content)
        (tmp_path / "label.labels.txt").unlink(missing_ok=True)
        if labels is not None:
            (tmp_path / "label.labels.txt").write_bytes(labels)
        found = watch("features", lambda: tfds_reader.describe(tmp_path), len(content))
        if found is not None:
            assert len(found.class_names) > 1 and all(n.isprintable() for n in found.class_names)
            assert found.image_shape[2] == 3 and min(found.image_shape) >= 1

    endless = json.dumps(features).replace('"28"', "Infinity").encode()
    fuzz(
        "features",
        st.tuples(mutated_json(features) | mutated(json.dumps(features).encode()), names),
        check,
        {"traceback: an endless image": (endless, None)},
    )


# ------------------------------------------------------------------------------------------------
# images

IMAGE_BOUND = 12 * images.PIXELS + (64 << 20)


def image_seeds():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    image = Image.fromarray(pixels)
    kinds = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "1"), ("PNG", "I;16")]
    kinds += [("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"), ("BMP", "1")]
    kinds += [("WEBP", "RGBA"), ("TIFF", "RGB"), ("TIFF", "L"), ("PPM", "RGB"), ("AVIF", "RGB")]
    kinds += [("EPS", "RGB"), ("ICO", "RGB"), ("TGA", "RGB")]
    for format, mode in kinds:
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, format)
        yield buffer.getvalue()
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", compression="tiff_lzw")
    yield buffer.getvalue()


def test_images(watch, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"  # what Pillow runs for EPS
    ghostscript.write_text(f"#!/bin/sh\ntouch {watch.canary}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    path = tmp_path / "image"

    def check(content):
        path.write_bytes(content)
        read = lambda: images.read_image(path, (32, 32))  # noqa: E731
        found = watch("images", read, len(content), IMAGE_BOUND)
        assert found is None or (found.shape == (32, 32, 3) and found.dtype == np.uint8)

    seeds = list(image_seeds())
    fuzz(
        "images",
        st.sampled_from(seeds).flatmap(mutated),
        check,
        {
            "code: Ghostscript runs an EPS": next(s for s in seeds if s.startswith(b"%!PS")),
            "memory: an image of 13,000 x 13,000": huge_png(13_000, 13_000),
            "traceback: a PPM of letters": b"P2\n4 4\n255\n" + b"x" * 20,
        },
    )


# ------------------------------------------------------------------------------------------------
# weights


def torch_bytes(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def repacked(content, changes, compression=zipfile.ZIP_STORED):
    """The zip file `content` with members changed by {end of the name: bytes}."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compresslevel=1) as new,
    ):
        for name in old.namelist():
            part = next((v for end, v in changes.items() if name.endswith(end)), old.read(name))
            new.writestr(name, part, compression)
    return buffer.getvalue()


def test_weights(watch, tmp_path):
    model = create_model("resnet", num_classes=10, widths=(2, 2, 2, 2))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = weights.to_state_dict("resnet", model, zeros)
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    first = next(iter(state))
    zipped = torch_bytes(tensors)
    legacy = torch_bytes(tensors, _use_new_zipfile_serialization=False)
    safe = safetensors_bytes(state)
    length = 8 + int.from_bytes(safe[:8], "little")
    with zipfile.ZipFile(io.BytesIO(zipped)) as members:
        pickled = next(members.read(n) for n in members.namelist() if n.endswith("data.pkl"))
    hostile = list(hostile_pickles(watch.canary))

    def with_header(text):
        return len(text).to_bytes(8, "little") + text + safe[length:]

    inputs = st.one_of(
        st.sampled_from([zipped, legacy, *hostile]).flatmap(mutated).map(lambda b: ("pt", b)),
        mutated_pickle([pickled, *hostile]).map(
            lambda b: ("pt", repacked(zipped, {"data.pkl": b}))
        ),
        mutated(safe).map(lambda b: ("safetensors", b)),
        mutated_json(json.loads(safe[8:length])).map(lambda b: ("safetensors", with_header(b))),
    )

    def check(value):
        suffix, content = value
        path = tmp_path / f"w.{suffix}"
        path.write_bytes(content)

        def read():
            return weights.from_state_dict("resnet", model, zeros, read_weights(path))

        found = watch("weights", read, len(content))
        if found is not None:
            same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), zeros, found)
            assert all(jax.tree.leaves(same))

    def pt(value, **kwargs):
        return "pt", torch_bytes(value, **kwargs)

    sparse = torch.eye(3).to_sparse()
    view = torch.ones(1, dtype=torch.bfloat16).expand(1 << 30)
    large = torch_bytes({first: torch.zeros(300 << 20, dtype=torch.uint8)})
    fuzz(
        "weights",
        inputs,
        check,
        {
            "traceback: names that are numbers": pt({1: torch.ones(2)}),
            "traceback: a sparse tensor": pt({first: sparse}),
            "traceback: a tensor without storage": pt({first: torch.ones(2, device="meta")}),
            "memory: a view of one element": pt({first: view}),
            "memory: compressed zeros": ("pt", repacked(large, {}, zipfile.ZIP_DEFLATED)),
            "traceback: a shape of no elements": (
                "safetensors",
                with_header(
                    b'{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}'
                )[: -len(safe[length:])],
            ),
        },
    )


# ------------------------------------------------------------------------------------------------
# the files of a run


def fields_of(config, before="config"):
    """{name of the flag: value} of every field."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from fields_of(value, f"{before}.{key}")
        else:
            yield f"{before}.{key}", value


CONFIG = {
    "seed": 0,
    "epochs": 3,
    "report": True,
    "data": {"name": "digits", "dir": "data"},
    "model": {"name": "resnet", "widths": [4, 8]},
    "optim": {"clip_norm": None, "b1": 0.9},
}
RESULT = {"status": "done", "test": {"accuracy": 87.5, "eval_loss": 0.4}, "epochs": 3}


def test_files_of_a_run(watch, tmp_path):
    about = {"class_names": ["a", "b"], "image_shape": [32, 32, 3], "sha256": {"train": "0"}}
    config_json = {"config": CONFIG, "imported": None, "data": about}
    files = {"config.json": config_json, "result.json": RESULT}
    names = st.sampled_from(list(files))

    @st.composite
    def inputs(draw):
        name = draw(names)
        text = json.dumps(files[name]).encode()
        return name, draw(mutated_json(files[name]) | mutated(text))

    def fixed(config):
        """What may not differ; a field that is not there is None."""
        free = tuple(f".{name}" for name in workdir.FREE_FIELDS)
        fields = dict(fields_of(config, ""))
        return {k: v for k, v in fields.items() if v is not None and not k.startswith(free)}

    def check(value):
        name, content = value
        for other in files:
            (tmp_path / other).write_text(json.dumps(files[other]))
        (tmp_path / name).write_bytes(content)
        read = lambda: workdir.finished_result(tmp_path, CONFIG)  # noqa: E731
        finished = watch("files of a run", read, len(content))
        if finished is not None:
            assert f"{finished['test']['accuracy']:.2f}"
        found = watch("files of a run", lambda: workdir.data_of(tmp_path), len(content))
        if found is not None:
            names, shape = found
            assert all(isinstance(n, str) for n in names) and len(np.empty(shape, np.uint8))
        read = lambda: workdir.open_workdir(tmp_path, CONFIG, {}, about)  # noqa: E731
        if watch("files of a run", read, len(content)) and name == "config.json":
            now = json.loads(content, parse_constant=lambda text: None)
            assert fixed(now["config"]) == fixed(CONFIG)

    def config(value):
        return "config.json", json.dumps({"config": {**CONFIG, "seed": value}}).encode()

    nested = b'{"config": ' + b'{"a":' * 480 + b"0" + b"}" * 481
    fuzz(
        "files of a run",
        inputs(),
        check,
        {
            "traceback: brackets": ("result.json", b"[" * 100_000),
            "traceback: nested 480 deep": ("config.json", nested),
            "traceback: done without a test": ("result.json", b'{"status": "done"}'),
            "traceback: accuracy is text": (
                "result.json",
                b'{"status": "done", "test": {"accuracy": "a"}}',
            ),
            "two lines: a name with a line break": ("config.json", b'{"config": {"a\\nb": 1}}'),
            "a page: a value of 100,000 letters": config("x" * 100_000),
        },
    )


# ------------------------------------------------------------------------------------------------
# checkpoints


def test_checkpoints(watch, tmp_path, capsys):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    whole, folder = saved(tmp_path / "whole", {1: 0.5, 2: 0.4}), tmp_path / "c"
    paths = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    contents = {str(path): (whole / path).read_bytes() for path in paths}
    as_json = {}
    for name, content in contents.items():
        with contextlib.suppress(ValueError):
            as_json[name] = json.loads(content)
    kernels = [np.asarray(jax.tree.leaves(state_at(step).params)[0]) for step in (1, 2)]
    like, zeros = state_at(0), sums()

    def sign(meta):
        """A meta whose checksum is right."""
        if isinstance(meta, dict) and "checksum" in meta:
            meta = {k: v for k, v in meta.items() if k != "checksum"}
            meta["checksum"] = _checksum_of_json(meta)
        return meta

    @st.composite
    def inputs(draw):
        """(file, what becomes of it, bytes), and how it is read."""
        return draw(changes()), draw(st.sampled_from(["best", "newest"]))

    @st.composite
    def changes(draw):
        how = draw(st.sampled_from(["json", "json", "bytes", "bytes", "place", "step"]))
        if how == "json":
            name = draw(st.sampled_from(sorted(as_json)))
            return name, "content", draw(mutated_json(as_json[name], sign))
        name = draw(st.sampled_from(sorted(contents)))
        if how == "bytes":
            return name, "content", draw(mutated(contents[name]))
        if how == "place":
            return name, draw(st.sampled_from(["gone", "a folder", "a link to itself"])), b""
        steps = ["3", "0", "01", "-1", "2147483648", "9" * 30, "²", "٣", "2.tmp", "x"]
        return "2", draw(st.sampled_from(steps)), b""

    def check(value):
        (name, how, content), kind = value
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        if name == "2":
            (folder / "2").rename(folder / how)
        else:
            spoil(folder / name, how, content)

        def best():
            with Checkpoints(folder, place, read_only=True) as checkpoints:
                return checkpoints.restore_best(like)

        def newest():
            with Checkpoints(folder, place) as checkpoints:
                return checkpoints.restore_latest(like, zeros)

        found = watch("checkpoints", best if kind == "best" else newest, len(content))
        if found is not None:
            state = found if kind == "best" else found[0]
            kernel = np.asarray(jax.tree.leaves(state.params)[0])
            assert any(np.array_equal(kernel, k) for k in kernels)
        capsys.readouterr()

    metas = [name for name in sorted(as_json) if "/meta/" in name and name.startswith("2")]
    meta = next(name for name in metas if "checksums" in as_json[name])
    loss = next(
        name for name in as_json if name.startswith("2/metrics/") and "eval_loss" in as_json[name]
    )
    no_sums = {k: v for k, v in as_json[meta].items() if k != "checksums"}
    fuzz(
        "checkpoints",
        inputs(),
        check,
        {
            f"traceback: {what} ({kind})": ((name, how, content), kind)
            for what, name, how, content in (
                ("the loss is text", loss, "content", b'{"eval_loss": "low"}'),
                ("the losses are a list", loss, "content", b"[1.0]"),
                ("brackets for a loss", loss, "content", b"[" * 100_000),
                ("the loss is a folder", loss, "a folder", b""),
                ("metadata is no object", "1/_CHECKPOINT_METADATA", "content", b"true"),
                ("meta without checksums", meta, "content", json.dumps(sign(no_sums)).encode()),
            )
            for kind in ("best", "newest")
        }
        | {"traceback: step 2147483648": (("2", "2147483648", b""), "best")},
    )


# ------------------------------------------------------------------------------------------------
# the command line


def test_overrides(watch, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # and back
    defaults = dict(fields_of(get_config().to_dict()))
    name = known = st.sampled_from(sorted(defaults))
    name |= st.tuples(name, st.sampled_from(["x", ".x", ".", "[0]", "\n", " ", "é"])).map("".join)
    name |= st.sampled_from(
        ["config.", "config..", "config.to_dict", "config.__class__", "config._x"]
    )
    value = st.text(max_size=30) | st.integers().map(str) | st.floats().map(str)
    value |= st.sampled_from(
        ["", "None", "True", "1e400", "nan", "9" * 5000, "(1,", "()", "1,2", "a,b"]
    )
    value |= st.sampled_from(["__import__('os').system('touch x')", "(" * 500, "-" * 9_000 + "1"])
    value |= st.sampled_from(
        ["[" * 90 + "]" * 90, "'", "b'x'", "{1: 2}", "1_0", "0x1", "\x1b[2J", "a\nb"]
    )
    pairs = st.tuples(known, value) | st.tuples(known, value) | st.tuples(name, value)
    flag = pairs.map(lambda pair: f"--{pair[0]}={pair[1]}") | name.map("--{}".format)
    inputs = st.lists(flag, min_size=1, max_size=3)

    def parse(arguments):
        with flagsaver.flagsaver():
            try:
                sys.argv = ["main.py", "--config=configs/quickstart.py", "--workdir=w", *arguments]
                main.parse(sys.argv)  # ml_collections looks for overrides in the first
            except SystemExit as error:
                lines = capsys.readouterr().err.splitlines()
                assert error.code == 2 and len(lines) == 1, lines
                raise InputError(lines[0]) from error
            return dict(fields_of(main.CONFIG.value.to_dict()))

    def check(arguments):
        found = watch("overrides", lambda: parse(arguments))
        if found is not None:
            assert found.keys() == defaults.keys()
            for key, default in defaults.items():
                assert default is None or type(found[key]) is type(default), key

    fuzz(
        "overrides",
        inputs,
        check,
        {
            "traceback: an index into a text": ["--config.data.dir[0]=x"],
            "traceback: an index into a switch": ["--config.alternating_flip[0]=x"],
        },
    )
