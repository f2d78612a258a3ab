"""--mode=predict: what the best checkpoint sees in image files."""

import pathlib

import jax
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_jax import InputError, data
from cifar_jax.experiment import make_augments, restore_best
from cifar_jax.steps import make_predict

SIZE = 32


def predict(config, workdir, images):
    """Print the top-3 classes with probabilities of each file in `images` (paths joined by commas).

    Any size and format that Pillow reads: scaled to 32 pixels on the shorter side, the middle cut
    out. Returns [(path, [(class name, probability)])]. Raises InputError, at the end, naming the
    files that could not be read.
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
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            unreadable.append(f"{name} ({getattr(error, 'strerror', None) or 'not an image'})")
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
    """The file as uint8 [32, 32, 3]: shorter side scaled to 32, centre cut out."""
    with Image.open(pathlib.Path(path).expanduser()) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC)
        return np.asarray(fitted)
