"""A run as TensorBoard's event files. The only file that says tensorboardX."""

import contextlib
import io
import math
import pathlib
import time

import numpy as np
from PIL import Image

from cifar_jax import InputError

SCALARS = {  # TensorBoard's tag, grouped by what is left of '/': the field of metrics.jsonl
    "loss/train": "train_loss",
    "loss/eval": "eval_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/eval": "eval_accuracy",
    "accuracy/eval_top3": "eval_top3",
    "accuracy/eval_top5": "eval_top5",
    "learning_rate": "lr",
    "images_per_second": "images_per_second",
}


class TensorBoard:
    """Event files in `folder` that hold exactly `records` (as in metrics.jsonl) and what is added.

    Those of the run before it was interrupted are made again, so that no point stands twice,
    whoever reads them. x is the step; the wall time of a point is that of the training, without
    the time between two processes.
    """

    def __init__(self, folder, records=()):
        try:
            import tensorboardX
        except ModuleNotFoundError as error:
            raise InputError(
                "config.log.tensorboard needs tensorboardX: pip install tensorboardX"
            ) from error
        folder = pathlib.Path(folder)
        with _told(folder):
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            self.writer = tensorboardX.SummaryWriter(str(folder))
        self.folder = folder
        self.now = time.time() - sum(record["seconds"] for record in records)
        for record in records:
            self.add_record(record)

    def add_record(self, record):
        """The figures of an epoch."""
        self.now += record["seconds"]
        self.add_scalars({tag: record[name] for tag, name in SCALARS.items()}, record["step"])

    def add_scalars(self, scalars, step):
        """{tag: number} at a step; what is not finite is left out."""
        with _told(self.folder):
            for tag, value in scalars.items():
                if value is not None and math.isfinite(value):
                    self.writer.add_scalar(tag, value, step, walltime=self.now)
            self.writer.flush()

    def add_pictures(self, pictures, step):
        """{name: PNG bytes} at a step."""
        with _told(self.folder):
            for name, png in pictures.items():
                with Image.open(io.BytesIO(png)) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self.writer.add_image(name, pixels, step, walltime=self.now, dataformats="HWC")
            self.writer.flush()

    def close(self):
        """Write what is left."""
        with _told(self.folder):
            self.writer.close()


@contextlib.contextmanager
def _told(folder):
    """What the disk refuses as one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
