"""System 002: the ResNet-9 shape of the DAWNBench entries (Sualeh77/ERAV1S10)."""

import flax.linen as nn
import jax.numpy as jnp

from cifar_jax.models.layers import BatchNorm, Conv, Dense, max_pool


class ResNet(nn.Module):
    """prep, layer1 + residual, layer2, layer3 + residual, global max-pool, linear; no biases.

    As in the original, the pool comes before BatchNorm, layer2's convolution has no padding (16 ->
    14), a residual branch ends in ReLU and nothing follows the addition. [B, 32, 32, 3] -> logits
    [B, num_classes]; 6,573,120 parameters at the default widths.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (64, 128, 256, 512)
    unbiased_variance: bool = True  # in BatchNorm's running statistics
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        def unit(x, width, name, padding=1, pool=False):
            settings = {"padding": padding, "use_bias": False, "dtype": self.dtype}
            x = Conv(width, **settings, name=f"{name}_conv")(x)
            if pool:
                x = max_pool(x, 2)
            norm = BatchNorm(unbiased=self.unbiased_variance, dtype=self.dtype, name=f"{name}_bn")
            return nn.relu(norm(x, train))

        prep, first, second, third = self.widths
        x = unit(x, prep, "prep")  # [B, 32, 32, 64]
        x = unit(x, first, "layer1", pool=True)  # [B, 16, 16, 128]
        x = x + unit(unit(x, first, "res1a"), first, "res1b")
        x = unit(x, second, "layer2", padding=0, pool=True)  # [B, 7, 7, 256]
        x = unit(x, third, "layer3", pool=True)  # [B, 3, 3, 512]
        x = x + unit(unit(x, third, "res3a"), third, "res3b")
        if x.shape[1] != x.shape[2]:
            raise ValueError(f"its last pool needs a square map, not {x.shape[1]} x {x.shape[2]}")
        x = max_pool(x, x.shape[1])  # the original's k4 s2 p1 pool covers the whole 3x3 map
        x = x.reshape(x.shape[0], -1)  # [B, 512]
        return Dense(self.num_classes, use_bias=False, dtype=self.dtype, name="fc")(x)
