"""A look before training: the model layer by layer, the data in pictures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import data, report
from cifar_jax.experiment import load_data, make_augments, make_model, sample_images
from cifar_jax.workdir import writable


def summarize(model, image_shape):
    """([(name, output shape without the batch, parameters)] in call order, all parameters)."""
    outputs = []

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            outputs.append((context.module.name or "output", output.shape[1:]))
        return output

    def init(x):
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), x, train=False)

    variables = jax.eval_shape(init, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(layer))
        for name, layer in variables["params"].items()
    }
    return [(name, shape, sizes.get(name, 0)) for name, shape in outputs], sum(sizes.values())


def print_summary(config, workdir=None):
    """Print the layer table; the last line is the total. Nothing is written."""
    del workdir
    class_names = data.CLASS_NAMES.get(config.data.name, data.CLASS_NAMES["cifar10"])
    layers, total = summarize(make_model(config, class_names), (32, 32, 3))
    width = max(len(name) for name, *_ in layers)
    print(f"{'Layer':<{width}}  {'Output shape':>16}  {'Params':>10}")
    for name, shape, size in layers:
        print(f"{name:<{width}}  {' x '.join(map(str, shape)):>16}  {size:>10,}")
    print(f"Total params: {total:,}")


def show_data(config, workdir):
    """Print the counts by class; write workdir/data/{counts,samples,augmented}.png."""
    folder = writable(workdir) / "data"
    class_names = data.CLASS_NAMES.get(config.data.name, ())
    augment, _ = make_augments(config)
    splits = load_data(config)
    counts = {
        name: np.bincount(split.labels, minlength=len(class_names))
        for name, split in splits.items()
    }
    width = max(map(len, class_names))
    print(f"{'class':<{width}}" + "".join(f"{name:>12}" for name in counts))
    for i, class_name in enumerate(class_names):
        print(f"{class_name:<{width}}" + "".join(f"{values[i]:>12,}" for values in counts.values()))
    print(f"{'total':<{width}}" + "".join(f"{values.sum():>12,}" for values in counts.values()))
    samples = sample_images(
        splits["train"], augment, config.augment.normalize, class_names, config.seed
    )
    figures = {
        "counts": report.draw_counts(counts, class_names),
        **report.draw_samples(samples, class_names),
    }
    report.save(figures, folder)
    print(f"pictures in {folder}")
