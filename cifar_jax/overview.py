"""A look before training: the model layer by layer, the data in pictures."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import flops, report
from cifar_jax.experiment import describe_data, load_data, make_augments, make_model
from cifar_jax.samples import sample_images
from cifar_jax.workdir import writable


class Row(NamedTuple):
    """A layer of the summary; figures are of one image."""

    name: str
    shape: tuple[int, ...]  # of the output
    params: int
    macs: int
    field: float  # the receptive field's side in pixels; inf: the whole image
    memory: int  # bytes of the output


def summarize(model, image_shape):
    """(a Row for each layer, in call order; all parameters)."""
    outputs = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            outputs[context.module.name or "output"] = output
        return output

    def init(x):
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), x, train=False)

    variables = jax.eval_shape(init, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(layer))
        for name, layer in variables["params"].items()
    }
    macs, fields = flops.by_layer(model, image_shape)
    last = math.inf
    rows = []
    for name, output in outputs.items():
        last = fields[name].size if name in fields else last
        memory = output.size * output.dtype.itemsize
        rows.append(Row(name, output.shape[1:], sizes.get(name, 0), macs[name], last, memory))
    return rows, sum(sizes.values())


def print_summary(config, workdir=None):
    """Print the layer table; the last line is the total. Nothing is written."""
    del workdir
    class_names, image_shape = describe_data(config)
    model = make_model(config, class_names, image_shape)
    rows, total = summarize(model, image_shape)
    width = max(len(row.name) for row in rows)
    print(
        f"{'Layer':<{width}}  {'Output shape':>15}  {'Params':>10}  {'Mult-adds':>13}  "
        f"{'Receptive field':>15}  {'Output, KiB':>11}"
    )
    for row in rows:
        field = "all" if math.isinf(row.field) else f"{row.field:.0f}"
        print(
            f"{row.name:<{width}}  {' x '.join(map(str, row.shape)):>15}  {row.params:>10,}  "
            f"{row.macs:>13,}  {field:>15}  {row.memory / 1024:>11,.1f}"
        )
    height, side = image_shape[:2]
    activations = sum(row.memory for row in rows[:-1])
    print(f"One image of {side} x {height}, {len(class_names)} classes")
    print(f"Mult-adds, forward: {sum(row.macs for row in rows):,}")
    print(f"Memory: outputs {activations / 2**20:.2f} MiB, params {4 * total / 2**20:.2f} MiB")
    print(f"Total params: {total:,}")


def show_data(config, workdir):
    """Print the counts by class, the image size and the pixels' mean and standard deviation; write
    workdir/data/{counts,samples,augmented}.png."""
    folder = writable(workdir) / "data"
    class_names, image_shape = describe_data(config)
    augment, _ = make_augments(config, image_shape)
    splits = load_data(config)
    counts = {
        name: np.bincount(split.labels, minlength=len(class_names))
        for name, split in splits.items()
    }
    width = max(5, *map(len, class_names))
    print(f"{'class':<{width}}" + "".join(f"{name:>12}" for name in counts))
    for i, class_name in enumerate(class_names):
        print(f"{class_name:<{width}}" + "".join(f"{values[i]:>12,}" for values in counts.values()))
    print(f"{'total':<{width}}" + "".join(f"{values.sum():>12,}" for values in counts.values()))
    height, side = image_shape[:2]
    mean, std = _pixel_statistics(splits["train"].images)
    print(f"images of {side} x {height}; the training pixels' own normalisation:")
    print(f"--config.augment.normalize.mean={mean} --config.augment.normalize.std={std}")
    samples = sample_images(
        splits["train"], augment, config.augment.normalize, class_names, config.seed
    )
    figures = {
        "counts": report.draw_counts(counts, class_names),
        **report.draw_samples(samples, class_names),
    }
    report.save(figures, folder)
    print(f"pictures in {folder}")


def _pixel_statistics(images):
    """(mean, standard deviation) by channel of all pixels / 255, as flags take them."""
    parts = range(0, len(images), 1000)  # whole, they would take eight times as much memory
    sums = sum((images[i : i + 1000] / 255.0).sum((0, 1, 2)) for i in parts)
    squares = sum(((images[i : i + 1000] / 255.0) ** 2).sum((0, 1, 2)) for i in parts)
    n = images[..., 0].size
    std = np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0))
    return tuple(",".join(f"{v:.4f}" for v in values) for values in (sums / n, std))
