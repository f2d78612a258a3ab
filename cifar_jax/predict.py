"""--mode=predict: what the best checkpoint sees in image files."""

import json
import sys

import jax
import numpy as np

from cifar_jax import InputError, one_line
from cifar_jax import workdir as files
from cifar_jax.experiment import make_augments, restore_best
from cifar_jax.images import files_of, read_image
from cifar_jax.metrics import softmax
from cifar_jax.steps import make_predict

TOP = 3
BATCH = 32  # images in one call, the last filled up; all of them where they are fewer


def predict(config, workdir, images, as_json=False):
    """Print the TOP classes with probabilities of each file in `images`, a line a file.

    `images`: paths joined by commas; of a folder all files in it and its folders, sorted. Whatever
    images.read_image reads, scaled to the run's image size on the shorter side, the middle cut out.
    Returns [(path, [(class name, probability)])]. A file that cannot be read is named on stderr and
    passed over. With `as_json` a line is {"file", "top": [{"class", "probability"}]}, or {"file",
    "error"} in place of what stderr has. InputError at the end says how many were.
    """
    if not all(images.split(",")):
        raise InputError("name image files or folders with --images=a.png,b.jpg,DIR")
    trained = restore_best(config, workdir)
    _, normalize = make_augments(config, trained.image_shape)
    logits_of = jax.jit(make_predict(trained.model, transform=normalize))
    paths = [path for name in images.split(",") for path in files_of(name)]
    size = min(BATCH, len(paths))
    room = np.zeros((size, *trained.image_shape), np.uint8)
    found = []
    for start in range(0, len(paths), size):
        read = []
        for path in paths[start : start + size]:
            try:
                room[len(read)] = read_image(path, trained.image_shape[:2])
                read.append(path)
            except InputError as error:
                _tell_error(path, error, as_json)
        rows = softmax(logits_of(trained.state, trained.state.key, room)) if read else ()
        for path, row in zip(read, rows[: len(read)], strict=True):
            best = np.argsort(-row, kind="stable")[:TOP]
            found.append((path, [(trained.class_names[i], float(row[i])) for i in best]))
            _tell(*found[-1], as_json)
    if len(found) < len(paths):
        raise InputError(f"{len(paths) - len(found)} of {len(paths)} files could not be read")
    return found


def _tell(path, top, as_json):
    if as_json:
        shares = [{"class": name, "probability": share} for name, share in top]
        print(json.dumps(files.finite({"file": str(path), "top": shares})), flush=True)
    else:
        shares = ", ".join(f"{one_line(name)} {100 * share:.1f} %" for name, share in top)
        print(f"{one_line(path)}: {shares}", flush=True)


def _tell_error(path, error, as_json):
    if as_json:
        print(json.dumps({"file": str(path), "error": str(error)}), flush=True)
    else:
        print(f"cannot read {error}", file=sys.stderr, flush=True)
