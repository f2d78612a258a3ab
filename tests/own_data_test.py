"""Own data: folders of images, TFDS's sets, and runs on them from training to a program."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from running import SMALLER, finish, result

from cifar_jax import InputError, data, workdir
from cifar_jax.metrics import softmax

CLASSES = ("nought", "one & <b>", "four")
CLASSES_SORTED = ("four", "nought", "one & <b>")


@pytest.fixture
def folder(tmp_path):
    """Digits 0, 1 and 4 as 24 x 20 images, 12 and 4 of each; returns the folder."""
    root = tmp_path / "own"
    for split, count in (("train", 12), ("test", 4)):
        digits = data.load("digits", "", split)
        for digit, name in zip((0, 1, 4), CLASSES):
            (root / split / name).mkdir(parents=True)
            chosen = digits.images[digits.labels == digit][:count]
            for i, pixels in enumerate(chosen):
                image = Image.fromarray(pixels).resize((20, 24))
                image.save(root / split / name / f"{i:02}.{'png' if i % 3 else 'bmp'}")
    (root / "train" / CLASSES[0] / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    return root


def test_a_folder_is_read_class_by_class(folder):
    about = data.describe("folder", folder)
    assert about == (CLASSES_SORTED, (24, 20, 3))
    train, test = (data.load("folder", folder, split) for split in data.SPLITS)
    assert train.images.shape == (36, 24, 20, 3) and train.images.dtype == np.uint8
    assert list(test.labels) == [0] * 4 + [1] * 4 + [2] * 4
    with Image.open(folder / "test" / CLASSES_SORTED[1] / "02.png") as image:
        np.testing.assert_array_equal(test.images[6], np.asarray(image))


def spoil(folder, how):
    train, test = folder / "train" / "four", folder / "test" / "four"
    if how == "another size":
        Image.new("RGB", (20, 25)).save(train / "99.png")
    elif how == "no image":
        (train / "01.png").write_bytes(b"\x89PNG\r\n")
    elif how == "empty":
        shutil.rmtree(test)
        test.mkdir()
    elif how == "lacking":
        shutil.rmtree(test)
    elif how == "unknown":
        (folder / "test" / "five").mkdir()
    elif how == "no test":
        shutil.rmtree(folder / "test")
    elif how == "one class":
        for name in CLASSES[:2]:
            shutil.rmtree(folder / "train" / name)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("another size", r"99\.png has 20 x 25 pixels where the first image has 20 x 24"),
        ("no image", r"cannot read .*01\.png \(not an image\)"),
        ("empty", "test/four holds no files"),
        ("lacking", "lacks the class four, which train has"),
        ("unknown", "five is a class that .*train has not"),
        ("no test", "there is no folder .*test"),
        ("one class", "train has 1 folders; it needs one for each class"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_sentence(how, says, folder):
    spoil(folder, how)
    with pytest.raises(InputError, match=says):
        for split in data.SPLITS:
            data.load("folder", folder, split)


@pytest.fixture
def prepared(tmp_path, rng):
    """A TFDS folder of 20 grey 28 x 28 images in three classes, with a feature more, and no test
    split but a validation one; returns (its data folder, images, labels)."""
    import tensorflow_datasets as tfds

    images = rng.integers(0, 256, (20, 28, 28, 1), np.uint8)
    labels = np.arange(20) % 3

    class Blots(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(names=CLASSES),
                "id": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(0, 14),
                "validation": self._generate_examples(14, 20),
            }

        def _generate_examples(self, first, end):
            for i in range(first, end):
                path = tmp_path / f"{i}.png"
                Image.fromarray(images[i, :, :, 0]).save(path)
                yield i, {"image": path.read_bytes(), "label": int(labels[i]), "id": i}

    Blots(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    return tmp_path / "tfds", images, labels


def test_a_set_of_which_files_are_missing(prepared):
    root, _, _ = prepared
    (whole,) = root.glob("blots/1.0.0/*-train.array_record-00000-of-00001")
    whole.rename(whole.with_name(whole.name.replace("of-00001", "of-00002")))
    with pytest.raises(InputError, match="1 files of train, not all that there are"):
        data.load("tfds:blots", root, "train")


def test_a_set_of_tfds_by_name(prepared, monkeypatch):
    root, images, labels = prepared
    monkeypatch.setenv("HOME", "/nonexistent")
    assert data.describe("tfds:blots", root) == (CLASSES, (28, 28, 3))
    train, test = (data.load("tfds:blots", root, split) for split in data.SPLITS)
    np.testing.assert_array_equal(train.images, images[:14].repeat(3, -1))
    np.testing.assert_array_equal(test.images, images[14:].repeat(3, -1))
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), labels)
    assert "tensorflow" not in sys.modules
    for name, says in (
        ("tfds:blot", "hold no dataset prepared as array_record"),
        ("tfds:../x", "is not tfds:NAME"),
        ("tfds:", "is not tfds:NAME"),
    ):
        with pytest.raises(InputError, match=says):
            data.load(name, root, "train")
    features = root / "blots" / "1.0.0" / "features.json"
    content = features.read_text()
    for old, new, says in (
        ('"28"', '"-1"', "must be of one size"),
        ('"3"', '"4"', "4 classes and 3 names"),
        ("image", "picture", "not an image-classification set"),
        ("{", "[", "not an image-classification set"),
    ):
        features.write_text(content.replace(old, new))
        with pytest.raises(InputError, match=says):
            data.load("tfds:blots", root, "train")


RUN_ALONE = """
import sys
for name in ("flax", "optax", "orbax", "cifar_jax", "tensorflow", "torch"):
    sys.modules[name] = None  # importing it raises
import numpy as np
from jax import export
net = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
print(net.platforms)
np.save(sys.argv[2], net.call(np.load(sys.argv[2])))
"""


@pytest.mark.long
def test_a_run_on_own_images_from_training_to_a_program(folder, program, tmp_path, cache):
    """At 24 x 20 pixels and three classes; once trained, predict needs no data."""
    own = ("--config=configs/quickstart.py", "--config.data.name=folder")
    own += SMALLER
    own += ("--config.epochs=1", "--config.batch_size=8", "--config.report=False")
    own += (f"--workdir={tmp_path}/run", f"--config.data.dir={folder}")
    finish(program(*own))
    made = result(tmp_path / "run")
    assert made["status"] == "done" and made["dataset"]["sizes"] == {"train": 36, "test": 12}
    assert list(made["per_class"]) == list(CLASSES_SORTED)
    # a program, alone
    out, _ = finish(program(*own, "--mode=export", "--format=stablehlo"))
    assert "12 test images" in out
    about = json.loads((tmp_path / "run" / "export" / "convnet.json").read_text())
    assert about["class_names"] == list(CLASSES_SORTED) and about["image_shape"] == [24, 20, 3]
    test = data.load("folder", folder, "test")
    np.save(tmp_path / "x.npy", test.images)
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALONE, tmp_path / "run/export/convnet.stablehlo", "x.npy"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "'cpu', 'cuda'" in done.stdout, done.stderr
    shares = softmax(np.load(tmp_path / "x.npy"))
    # no data any more: the run knows its classes; what cannot be read is named and passed over
    files = sorted(p.relative_to(folder / "test") for p in folder.glob("test/*/*"))
    shutil.move(folder / "test", tmp_path / "photos")
    shutil.rmtree(folder)
    (tmp_path / "photos" / "four" / "01.png").write_bytes(b"\xff\xd8\xff")
    look = program(*own, "--mode=predict", "--json", f"--images={tmp_path}/photos")
    out, err = finish(look, code=2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 12 and sum("error" in line for line in lines) == 1
    assert "01.png (not an image)" in next(line for line in lines if "error" in line)["error"]
    assert err.splitlines()[-1] == "main.py: 1 of 12 files could not be read"
    for line in lines:
        for place in line.get("top", ()):
            assert place["class"] in CLASSES and 0 <= place["probability"] <= 1
    seen = {line["file"]: line["top"] for line in lines if "top" in line}
    assert list(seen) == sorted(seen)
    expected = {str(tmp_path / "photos" / f): row for f, row in zip(files, shares, strict=True)}
    for file, top in seen.items():
        found = {place["class"]: place["probability"] for place in top}
        np.testing.assert_allclose(
            [found[name] for name in CLASSES_SORTED], expected[file], rtol=1e-3
        )
    with pytest.raises(InputError, match="on other data .class_names is"):
        workdir.check_data(tmp_path / "run", {"class_names": ("aleph", "beth", "gimel")})
