"""System 000: four pooled pairs of convolutions, four linear layers (ZiadHelal/pytorch-cifar10)."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from cifar_jax.models.layers import BatchNorm, Conv, Dense, max_pool


class VGG(nn.Module):
    """(Conv -> ReLU -> BatchNorm) x 2 -> max-pool -> dropout, four times; head with log-softmax.

    [B, 32, 32, 3] -> log-probabilities [B, num_classes]; 2,882,474 parameters by default.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (32, 64, 128, 256)
    dropout: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5)
    head_widths: tuple[int, ...] = (1024, 512, 256)
    head_dropout: float = 0.3
    unbiased_variance: bool = True  # in BatchNorm's running statistics
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(BatchNorm, unbiased=self.unbiased_variance)
        for i, (width, rate) in enumerate(zip(self.widths, self.dropout, strict=True)):
            for j in (2 * i + 1, 2 * i + 2):
                x = Conv(width, dtype=self.dtype, name=f"conv{j}")(x)
                x = norm(dtype=self.dtype, name=f"bn{j}")(nn.relu(x), train)
            x = max_pool(x, 2)  # [B, 16, 16, 32], [B, 8, 8, 64], [B, 4, 4, 128], [B, 2, 2, 256]
            x = nn.Dropout(rate, deterministic=not train, name=f"dropout{i + 1}")(x)
        x = x.reshape(x.shape[0], -1)  # [B, 1024]
        for i, width in enumerate(self.head_widths, 1):
            x = nn.relu(Dense(width, dtype=self.dtype, name=f"fc{i}")(x))
            x = nn.Dropout(self.head_dropout, deterministic=not train, name=f"fc_dropout{i}")(x)
        x = Dense(self.num_classes, dtype=self.dtype, name=f"fc{len(self.head_widths) + 1}")(x)
        return nn.log_softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
