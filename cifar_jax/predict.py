"""--mode=predict: what the best checkpoint sees in image files."""

import pathlib

import jax
import numpy as np
import optax
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_jax import InputError, data, sharding
from cifar_jax import workdir as files
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.experiment import make_augments, make_model
from cifar_jax.steps import init_state, make_predict

SIZE = 32


def predict(config, workdir, images):
    """Print the top-3 classes with probabilities of each file in `images` (paths joined by commas).

    Any size and format that Pillow reads: scaled to 32 pixels on the shorter side, the middle cut
    out. Returns [(path, [(class name, probability)])]. Raises InputError, at the end, naming the
    files that could not be read.
    """
    if not images:
        raise InputError("name image files with --images=a.png,b.jpg")
    path = files.existing(workdir)
    files.check_config(path, config.to_dict(), files.LOOKING_FIELDS)
    class_names = data.CLASS_NAMES.get(config.data.name, ())
    model = make_model(config, class_names)
    _, normalize = make_augments(config)
    state = init_state(jax.random.key(0), model, optax.identity(), (SIZE, SIZE, 3))
    whole = sharding.replicated(sharding.make_mesh())
    with Checkpoints(path / "checkpoints", whole, read_only=True) as checkpoints:
        state = checkpoints.restore_best(state)
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
