"""Image files as pixels: what predict looks at, and what own data are made of."""

import functools
import pathlib
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

from cifar_jax import InputError, meant_file
from cifar_jax.dataset import Dataset, Description, room_for

# What Pillow reads by itself; EPS, for one, it has Ghostscript run.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA")
FORMATS += ("PCX", "SGI", "DDS", "QOI")
# what own images are called
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PIXELS = 2**26  # the most that is decoded: 4 to 12 bytes each
TURNS = {  # EXIF's orientation: what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path, size=None):
    """The file as uint8 [H, W, 3], upright; of `size` (H, W) if given, else of its own.

    To come to `size` it is scaled until it covers that, and the middle cut out. FORMATS, up to
    PIXELS; of 16 bits the upper eight. Raises InputError, 'PATH (why)', for anything else.
    """
    try:
        place = pathlib.Path(path).expanduser()
        with (
            warnings.catch_warnings(action="ignore"),  # Pillow's doubts about what it can read
            Image.open(place, formats=_formats()) as image,
        ):
            if image.width * image.height > PIXELS:
                raise InputError(f"{path} (more than {PIXELS / 1e6:.0f} million pixels)")
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            if image.mode.startswith("I"):
                image = image.convert("I")
            elif image.mode not in ("RGB", "L"):
                image = image.convert("RGB")
            if size:  # before it is turned: that takes as much memory again
                sideways = orientation in (5, 6, 7, 8)
                box = size if sideways else size[::-1]
                image = ImageOps.fit(image, box, Image.Resampling.BICUBIC)
            if orientation in TURNS:
                image = image.transpose(TURNS[orientation])
            if image.mode == "I":
                upper = np.clip(np.asarray(image) >> 8, 0, 255)
                image = Image.fromarray(upper.astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} ({error.strerror}{meant_file(place)})") from error
    except Exception as error:  # Pillow's plugins raise what they like
        reason = getattr(error, "strerror", None) or "not an image"
        raise InputError(f"{path} ({reason})") from error


def files_of(path):
    """Every file in the folder `path` and its folders, sorted, hidden ones left out; else [path].

    Raises InputError for a folder without files.
    """
    try:
        path = pathlib.Path(path).expanduser()
        if not path.is_dir():
            return [path]
        found = sorted(p for p in path.rglob("*") if not _hidden(p.relative_to(path)))
        found = [p for p in found if p.is_file()]
    except (OSError, RuntimeError, ValueError) as error:  # the home of nobody; a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}") from error
    if not found:
        raise InputError(f"{path} holds no files")
    return found


@functools.cache
def _formats():
    """Those of FORMATS that this build of Pillow knows: with others it raises KeyError."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _hidden(path):
    return any(part.startswith(".") for part in path.parts)


def _classes(folder):
    """The folders in `folder`, sorted by name, hidden ones left out; InputError without it."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; own data are DIR/train/CLASS/*.png and "
            "DIR/test/CLASS/*.png, DIR named with --config.data.dir"
        )
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def _images_of(folder):
    """The image files of one class."""
    found = [p for p in files_of(folder) if p.suffix.lower() in SUFFIXES]
    if not found:
        raise InputError(f"{folder} holds no image ({', '.join(SUFFIXES)}); every class needs one")
    return found


def describe_folder(root):
    names = _classes(root / "train")
    if len(names) < 2:
        raise InputError(f"{root / 'train'} has {len(names)} folders; it needs one for each class")
    return Description(tuple(names), _pixels(_images_of(root / "train" / names[0])[0]).shape)


def _pixels(path):
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(f"cannot read {error}") from error


def read_folder(root, about, split):
    """root/split/CLASS/*, class by class, each sorted by name."""
    unknown = [name for name in _classes(root / split) if name not in about.class_names]
    if unknown:
        raise InputError(f"{root / split / unknown[0]} is a class that {root / 'train'} has not")
    paths, labels = [], []
    for label, name in enumerate(about.class_names):
        if not (root / split / name).is_dir():
            raise InputError(f"{root / split} lacks the class {name}, which train has")
        found = _images_of(root / split / name)
        paths += found
        labels += [label] * len(found)
    images = room_for(len(paths), about.image_shape, root / split)
    for i, path in enumerate(paths):
        pixels = _pixels(path)
        if pixels.shape != about.image_shape:
            (height, width), (h, w) = pixels.shape[:2], about.image_shape[:2]
            raise InputError(
                f"{path} has {width} x {height} pixels where the first image has {w} x {h}; "
                "all must be of one size: scale them first"
            )
        images[i] = pixels
    return Dataset(images, np.array(labels, np.int32))
