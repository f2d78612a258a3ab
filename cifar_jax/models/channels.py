"""Vectors with a value for each channel."""

import jax.numpy as jnp


def per_channel(vector, x):
    """`vector` [C] in a shape that broadcasts with x [..., C]."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def add_bias(bias, x):
    """x [..., C] + bias [C] in x's dtype, but added in float32 at least: the bias's gradient, a sum
    over all the rest, would else be one of bfloat16 on GPUs that can add these. A bias that is None
    adds nothing."""
    if bias is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide + per_channel(bias, x)).astype(x.dtype)
