"""Mutated data: every reader of datasets and images gives right data or one InputError."""

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
from data_test import assert_is, dumps, python_batch, small  # noqa: F401
from fuzzing import (
    IMAGE_BOUND,
    PLACES,
    fuzz,
    hostile_pickles,
    mutated,
    mutated_json,
    mutated_pickle,
    spoil,
    watching,  # noqa: F401
)
from hypothesis import strategies as st
from PIL import Image

from cifar_jax import InputError, data, images, official, tfds_reader, workdir
from cifar_jax.exchange import read_weights

# ------------------------------------------------------------------------------------------------
# pickles


def batch(images=2):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 32, 32, 3), np.uint8)
    return python_batch(pixels, np.arange(images) % 10)


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
                "traceback: half a character": "\udd00/..",
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
