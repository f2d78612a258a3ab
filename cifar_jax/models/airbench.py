"""The speedrun's net (KellerJordan/cifar10-airbench, arXiv 2404.00498)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from cifar_jax.models.layers import BatchNorm, Conv, Dense, convolve, max_pool


def whitening_kernel(images, size=2, epsilon=5e-4):
    """Filters whose responses to patches of `images` are uncorrelated, and their negatives.

    images [N, H, W, C], normalised; kernel [size, size, C, 2 * size * size * C]: the eigenvectors
    of the patches' uncentred covariance, each divided by sqrt(eigenvalue + epsilon).
    """
    height, width, channels = images.shape[1:]
    rows, columns = height - size + 1, width - size + 1
    shifts = [(i, j) for i in range(size) for j in range(size)]
    patches = jnp.concatenate([images[:, i : i + rows, j : j + columns] for i, j in shifts], -1)
    patches = patches.reshape(-1, patches.shape[-1])
    # a GPU would round the products to TF32
    covariance = jnp.matmul(patches.T, patches, precision=lax.Precision.HIGHEST) / len(patches)
    values, vectors = jnp.linalg.eigh(covariance)
    filters = vectors / jnp.sqrt(values + epsilon)[None]
    return jnp.concatenate([filters, -filters], 1).reshape(size, size, channels, -1)


class Whitening(nn.Module):
    """2 x 2 convolution without padding; its kernel is measured on the data, its bias is trained.

    Variables: params bias [24]; batch_stats kernel [2, 2, 3, 24], zero until measured. The kernel
    is a statistic like a running mean: kept with the model and never seen by the optimizer.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (2, 2, x.shape[-1], 8 * x.shape[-1])
        kernel = self.variable("batch_stats", "kernel", jnp.zeros, shape).value
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        x = lax.stop_gradient(x).astype(self.dtype)
        return convolve(x, kernel.astype(self.dtype), 0, bias=bias)


class AirBench(nn.Module):
    """Whitening, GELU, a group for each of `widths`, 3 x 3 max-pool, linear, logits scaled down.

    A group: conv -> 2 x 2 max-pool -> BatchNorm -> GELU, then conv -> BatchNorm -> GELU until there
    are `depth` convolutions; from three on, the first GELU's output is added before the last GELU.
    BatchNorm has no scale. [B, 32, 32, 3] -> logits [B, num_classes]; 1,971,352 parameters and 288
    of the whitening at the default widths.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (64, 256, 256)
    depth: int = 2  # convolutions a group
    momentum: float = 0.6  # BatchNorm's: share of the old running value
    logit_scale: float = 1 / 9
    whitening_images: int = 5000  # the first so many are measured
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        def conv(x, width, name):
            kwargs = {"use_bias": False, "identity": True, "dtype": self.dtype}
            return Conv(width, **kwargs, name=name)(x)

        def norm(x, name):
            kwargs = {"use_scale": False, "dtype": self.dtype}
            return BatchNorm(self.momentum, 1e-12, **kwargs, name=name)(x, train)

        x = gelu(Whitening(self.dtype, name="whiten")(x))  # [B, 31, 31, 24]
        for i, width in enumerate(self.widths, 1):
            # [B, 15, 15, 64], [B, 7, 7, 256], [B, 3, 3, 256]
            x = gelu(norm(max_pool(conv(x, width, f"group{i}_conv1"), 2), f"group{i}_bn1"))
            skip = x if self.depth > 2 else 0
            for k in range(2, self.depth + 1):
                x = norm(conv(x, width, f"group{i}_conv{k}"), f"group{i}_bn{k}")
                x = gelu(x + skip if k == self.depth else x)
        x = max_pool(x, 3)
        x = x.reshape(x.shape[0], -1)  # [B, 256]
        head = Dense(self.num_classes, use_bias=False, dtype=self.dtype, name="head")
        return head(x) * self.logit_scale

    @nn.nowrap
    def initialize_from_data(self, variables, images):
        """`variables` with the whitening measured on normalised training images [N, H, W, C]."""
        statistics = variables["batch_stats"]
        kernel = whitening_kernel(images).astype(statistics["whiten"]["kernel"].dtype)
        statistics = {**statistics, "whiten": {**statistics["whiten"], "kernel": kernel}}
        return {**variables, "batch_stats": statistics}


def gelu(x):
    """x * Phi(x), exact: by the error function, as torch.nn.GELU."""
    return nn.gelu(x, approximate=False)
