"""What a report shows of the data and of the first layer, as arrays."""

import jax
import numpy as np


def sample_images(train, augment, normalization, class_names, seed, columns=10):
    """What report.draw_samples draws, uint8: images by class, and a few under the augmentation.

    by_class [C, columns, H, W, 3], white where a class has fewer images; augmented
    [A, columns, H, W, 3] of the first A = min(C, columns) classes, the original first;
    augmented_names [A]. `normalization` (mean, std) is undone for the eye.
    """
    images, labels = np.asarray(train.images), np.asarray(train.labels)
    rng = np.random.default_rng(seed)
    by_class = np.full((len(class_names), columns, *images.shape[1:]), 255, np.uint8)
    for row, c in zip(by_class, range(len(class_names)), strict=True):
        found = np.flatnonzero(labels == c)
        chosen = rng.choice(found, min(columns, len(found)), replace=False)
        row[: len(chosen)] = images[chosen]
    originals = by_class[:columns, 0]
    keys = jax.random.split(jax.random.key(seed), columns - 1)
    versions = np.stack([np.asarray(jax.jit(augment)(key, originals)) for key in keys], 1)
    shown = (versions * np.asarray(normalization["std"]) + np.asarray(normalization["mean"])) * 255
    shown = np.clip(np.round(shown), 0, 255).astype(np.uint8)
    return {
        "by_class": by_class,
        "augmented": np.concatenate([originals[:, None], shown], 1),
        "augmented_names": class_names[:columns],
    }


def first_filters(state, channels=3):
    """The first kernel [H, W, channels, filters] in `state` that reads images; None without one."""
    for leaf in jax.tree.leaves((state.params, state.batch_stats)):  # the speedrun's is a statistic
        if leaf.ndim == 4 and leaf.shape[2] == channels:
            return np.asarray(leaf, np.float32)
    return None
