"""System 001: five convolutions without BatchNorm, channel dropout (iVishalr/cifar10-pytorch)."""

import flax.linen as nn
import jax.numpy as jnp

from cifar_jax.models.layers import Conv, Dense, max_pool


class ConvNet(nn.Module):
    """Five Conv -> ReLU, max-pool after 2 and 4, channel dropout after 3 and 5, four linear layers.

    [B, 32, 32, 3] -> logits [B, num_classes]; 2,791,434 parameters at the default widths.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (8, 32, 64, 128, 256)
    head_widths: tuple[int, ...] = (256, 128, 64)
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        for i, width in enumerate(self.widths, 1):
            padding = 0 if i == len(self.widths) else 1
            x = nn.relu(Conv(width, padding=padding, dtype=self.dtype, name=f"conv{i}")(x))
            if i in (2, 4):
                x = max_pool(x, 2)  # [B, 16, 16, 32], [B, 8, 8, 128]
            if i in (3, 5):  # one mask value a channel, as torch.nn.Dropout2d
                dropout = nn.Dropout(self.dropout, broadcast_dims=(1, 2), name=f"dropout{i}")
                x = dropout(x, deterministic=not train)
        x = x.reshape(x.shape[0], -1)  # [B, 6 * 6 * 256]
        for i, width in enumerate(self.head_widths, 1):
            x = nn.relu(Dense(width, dtype=self.dtype, name=f"fc{i}")(x))
        return Dense(self.num_classes, dtype=self.dtype, name=f"fc{len(self.head_widths) + 1}")(x)
