"""System 003: six dynamic-mixture blocks (lasyaMundrathi/CIFAR-10-Image-Classification...-CNN-)."""

import flax.linen as nn
import jax.numpy as jnp

from cifar_jax.models.layers import BatchNorm, Conv, Dense, max_pool


class Mixture(nn.Module):
    """Six blocks, each an image's own weighted sum of convolutions; global average; two linear.

    A block computes `branches` parallel Conv -> BatchNorm -> ReLU (-> max-pool) and adds them with
    the image's own weights ReLU(Linear(global average of the block's input)). The branches run as
    one convolution with branches * width output channels, ordered branch by branch: the same
    function, fewer calls. [B, 32, 32, 3] -> logits [B, num_classes]; 4,796,649 parameters.

    `sequential=True` is the literal reading of the original's README: three convolutions in
    sequence in each block, no weights; 7,941,594 parameters.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (20, 32, 64, 128, 256, 512)
    pooled: tuple[bool, ...] = (False, False, True, True, True, True)
    branches: int = 3
    head_width: int = 128
    dropout: float = 0.2
    sequential: bool = False
    unbiased_variance: bool = True  # in BatchNorm's running statistics
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        block = self.sequential_block if self.sequential else self.mixture_block
        for i, (width, pool) in enumerate(zip(self.widths, self.pooled, strict=True), 1):
            x = block(x, train, width, pool, f"block{i}")
        x = x.mean((1, 2))  # [B, 512]
        x = nn.relu(Dense(self.head_width, dtype=self.dtype, name="fc1")(x))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return Dense(self.num_classes, dtype=self.dtype, name="fc2")(x)

    def norm(self, name):
        return BatchNorm(unbiased=self.unbiased_variance, dtype=self.dtype, name=name)

    def mixture_block(self, x, train, width, pool, name):
        gate = Dense(self.branches, dtype=self.dtype, name=f"{name}_gate")
        weights = nn.relu(gate(x.mean((1, 2))))  # [B, K]
        conv = Conv(self.branches * width, dtype=self.dtype, name=f"{name}_conv")
        x = nn.relu(self.norm(f"{name}_bn")(conv(x), train))  # [B, H, W, K * width]
        if pool:
            x = max_pool(x, 2)
        # by slices: with an axis of branches the gradient takes twice as long on CPU
        branches = jnp.split(x, self.branches, -1)  # each [B, H, W, width]
        return sum(weights[:, k, None, None, None] * x for k, x in enumerate(branches))

    def sequential_block(self, x, train, width, pool, name):
        for k in range(1, self.branches + 1):
            x = Conv(width, dtype=self.dtype, name=f"{name}_conv{k}")(x)
            x = nn.relu(self.norm(f"{name}_bn{k}")(x, train))
        return max_pool(x, 2) if pool else x
