"""System 004: grouped and dilated convolutions at nearly full resolution (ShikhaERAV2/Session9)."""

import flax.linen as nn
import jax.numpy as jnp

from cifar_jax.models.layers import BatchNorm, Conv, Dense, avg_pool


class Dilated(nn.Module):
    """Four groups C1-C4 of Conv -> BatchNorm -> ReLU, average pool, two linear, log-softmax.

    As in the original: the 'depthwise' convolution has 3 groups and a bias, the 1x1 has a bias, the
    dilated ones (dilation 2, padding 1) shrink the map by 2, nothing stands between the two linear
    layers. [B, 32, 32, 3] -> log-probabilities [B, num_classes]; 2,034,040 parameters.
    """

    num_classes: int = 10
    head_width: int = 100
    unbiased_variance: bool = True  # in BatchNorm's running statistics
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        def unit(x, width, name, **conv):
            x = Conv(width, **{"use_bias": False, **conv}, dtype=self.dtype, name=f"{name}_conv")(x)
            norm = BatchNorm(unbiased=self.unbiased_variance, dtype=self.dtype, name=f"{name}_bn")
            return nn.relu(norm(x, train))

        x = unit(x, 32, "c1a")  # [B, 32, 32, 32]
        x = unit(x, 30, "c1b", padding=0)  # [B, 30, 30, 30]
        x = unit(x, 30, "c2a", groups=3, use_bias=True)
        x = unit(x, 32, "c2b", kernel_size=1, padding=0, use_bias=True)  # [B, 30, 30, 32]
        x = unit(x, 64, "c3a", dilation=2)  # [B, 28, 28, 64]
        x = unit(x, 64, "c3b", dilation=2)  # [B, 26, 26, 64]
        x = unit(x, 64, "c3c", dilation=2)  # [B, 24, 24, 64]
        for i, width in enumerate((128, 128, 128, 128, 256, 128)):
            x = unit(x, width, f"c4{'abcdef'[i]}")  # [B, 24, 24, width]
        x = avg_pool(x, 3)  # [B, 8, 8, 128]
        x = x.reshape(x.shape[0], -1)
        x = Dense(self.head_width, dtype=self.dtype, name="fc1")(x)
        x = Dense(self.num_classes, dtype=self.dtype, name="fc2")(x)
        return nn.log_softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
