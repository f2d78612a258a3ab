"""--mode=predict: what the best checkpoint sees in image files."""

import pathlib
import warnings

import jax
import numpy as np
from PIL import Image, ImageOps

from cifar_jax import InputError, data
from cifar_jax.experiment import make_augments, restore_best
from cifar_jax.steps import make_predict

SIZE = 32
# Pillow reads more; EPS, for one, by running Ghostscript on the file
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
PIXELS = 2**26  # the most that is decoded: 4 to 12 bytes each


def predict(config, workdir, images):
    """Print the top-3 classes with probabilities of each file in `images` (paths joined by commas).

    FORMATS of up to PIXELS: scaled to 32 pixels on the shorter side, the middle cut out. Returns
    [(path, [(class name, probability)])]. Raises InputError, at the end, naming the files that
    could not be read.
    """
    if not images:
        raise InputError("name image files with --images=a.png,b.jpg")
    _, model, state = restore_best(config, workdir, (SIZE, SIZE, 3))
    class_names = data.CLASS_NAMES.get(config.data.name, ())
    _, normalize = make_augments(config)
    logits_of = jax.jit(make_predict(model, transform=normalize))
    found, unreadable = [], []
    for name in images.split(","):
        try:
            pixels = read_image(name)
        except InputError as error:
            unreadable.append(str(error))
            continue
        logits = logits_of(state, state.key, pixels[None])
        probabilities = np.asarray(jax.nn.softmax(logits))[0]
        top = [(class_names[i], float(probabilities[i])) for i in np.argsort(-probabilities)[:3]]
        found.append((name, top))
        print(f"{name}: " + ", ".join(f"{label} {100 * p:.1f} %" for label, p in top))
    if unreadable:
        raise InputError("cannot read " + ", ".join(unreadable))
    return found


def read_image(path):
    """The file as uint8 [32, 32, 3]: shorter side scaled to 32, centre cut out; else InputError."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # Pillow's doubts about what it can read
            Image.open(pathlib.Path(path).expanduser(), formats=FORMATS) as image,
        ):
            if image.width * image.height > PIXELS:
                raise InputError(f"{path} (more than {PIXELS / 1e6:.0f} million pixels)")
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return np.asarray(ImageOps.fit(rgb, (SIZE, SIZE), Image.Resampling.BICUBIC))
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like
        reason = getattr(error, "strerror", None) or "not an image"
        raise InputError(f"{path} ({reason})") from error
