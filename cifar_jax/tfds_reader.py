"""Sets that TFDS prepared, read without TensorFlow; the official ones from their home."""

import io
import json
import pathlib
import re
import threading

import numpy as np

from cifar_jax import InputError, first_line, official, one_line
from cifar_jax.dataset import SPLITS, Dataset, Description, room_for

# seconds to get an answer from the data's home before the download is given up
NETWORK_TIMEOUT = 8.0


def home():
    """Where TFDS keeps its data unless told otherwise; as written where there is no home."""
    path = pathlib.Path("~/tensorflow_datasets")
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def find(root, name):
    """The newest version folder of set `name`, prepared as array_record, under the TFDS data folder
    `root` (or that folder itself), else under `home`; None without one."""
    for folder in (root, home()):
        found = [
            info.parent
            for place in (folder / name, folder)
            for info in sorted(place.glob("*/dataset_info.json"), key=_version)
            if place.name == pathlib.PurePath(name).name and _version(info)
            if any(info.parent.glob("*.array_record*"))  # TFDS's default is another
        ]
        if found:
            return found[-1]
    return None


def _version(info):
    """[] of a folder that is none: TFDS names one in the making otherwise."""
    known = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", info.parent.name)
    return [int(number) for number in known.groups()] if known else []


def folder_of(name, root):
    """The folder of tfds:NAME or tfds:NAME/CONFIG as prepared; InputError without it."""
    stem = name.removeprefix("tfds:")
    if not re.fullmatch(r"\w+(/[\w.+-]*\w)?", stem):
        raise InputError(f"{name!r} is not tfds:NAME or tfds:NAME/CONFIG")
    folder = find(root, stem)
    if folder is None:
        raise InputError(
            f"{root / stem} and {home() / stem} hold no dataset prepared as array_record; where "
            f"TensorFlow is, "
            f"tfds.builder({stem!r}, data_dir={str(root)!r}, file_format='array_record')"
            ".download_and_prepare() makes it"
        )
    return folder


def describe(folder):
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


def features_of(about, with_id):
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

    features, raw = features_of(about, count is not None), {"image": tfds.decode.SkipDecoding()}
    ids, labels = [], []
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        shards = sorted(folder.glob(f"*-{split}.array_record*"))
        if not shards:
            raise ValueError(f"it has no {split} split in array_record files")
        totals = [re.search(r"-of-(\d+)$", shard.name) for shard in shards]
        if any(total and int(total[1]) != len(shards) for total in totals):
            raise ValueError(f"it has {len(shards)} files of {split}, not all that there are")
        source = ArrayRecordDataSource(shards)
        if len(source) != (count or len(source)):
            raise ValueError(f"{len(source)} images of {split} instead of {count}")
        images = room_for(len(source), about.image_shape, folder)
        for start in range(0, len(source), 1000):
            for record in source.__getitems__(range(start, min(start + 1000, len(source)))):
                example = features.deserialize_example_np(record, decoders=raw)
                images[len(labels)] = _pixels(example["image"], about.image_shape)
                labels.append(np.int32(example["label"]))
                ids.append(example["id"].decode() if count else "")
    except InputError:
        raise
    except Exception as error:  # these readers raise what they like
        raise InputError(
            f"{folder} cannot be read as an array_record TFDS folder: {first_line(error)}"
        ) from error
    return ids, images, np.array(labels)


def read_official(folder, which, split):
    """Read an official set as prepared by TFDS (the stock one is shuffled; ids like train_16399
    give the official order)."""
    count = len(which.class_names) * which.per_class[split]
    about = Description(which.class_names, (32, 32, 3))
    ids, images, labels = _examples(folder, about, split, count)
    order = [name.split("_")[-1] for name in ids]
    order = [int(text) if re.fullmatch("[0-9]{1,9}", text) else -1 for text in order]
    if sorted(order) != list(range(count)):
        raise InputError(f"{folder} does not hold each image of {split} once; prepare it again")
    ranks = np.argsort(order)
    return Dataset(images[ranks], labels[ranks])


def read(folder, about, split):
    """Any image-classification set of TFDS, in its order; its validation split where it has no
    test split."""
    if split == "test" and not any(folder.glob("*-test.array_record*")):
        split = "validation"
    _, images, labels = _examples(folder, about, split)
    classes = len(about.class_names)
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{folder} has a label of {split} that is not one of its {classes}")
    return Dataset(images, labels)


def answers(url):
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


def download(name, root, looked):
    """Fetch the binary archive from its home and prepare it as TFDS does, in root/NAME/VERSION;
    returns that folder."""
    which = official.OFFICIAL[name]
    title, url = which.title, which.url
    trouble = answers(url)
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
                features=features_of(Description(which.class_names, (32, 32, 3)), True),
                supervised_keys=("image", "label"),
                homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            archive = pathlib.Path(dl_manager.download(url))
            fetched.append(archive)
            return {split: self._generate_examples(archive, split) for split in SPLITS}

        def _generate_examples(self, archive, split):
            from PIL import Image

            dataset = official.binary_archive(archive, which, split)
            for i, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                yield (
                    i,
                    {"id": f"{split}_{i:05d}", "image": png.getvalue(), "label": int(label)},
                )

    fetched = []
    try:
        Cifar.name = name  # which its body could not have taken from here
        builder = Cifar(data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    except InputError:  # TFDS would take the damaged file again
        for archive in fetched:
            for path in (archive, archive.with_name(f"{archive.name}.INFO")):
                path.unlink(missing_ok=True)
        raise
    except Exception as error:
        done = find(root, name)
        if done:  # another process was faster
            return done
        raise InputError(
            f"downloading {title} from {url} into {root} failed: {first_line(error)}"
        ) from error
    return pathlib.Path(builder.data_dir)
