"""Convolution for one CPU: matrix products over pieces of the batch that fit in the cache.

XLA's CPU convolutions lose their data to memory at CIFAR shapes, most of all in the weight
gradient. Here each
piece of a few images is unrolled to [pixels, k * k * C] (im2col) and multiplied; the gradients are
matrix products
too. Equal to lax.conv_general_dilated up to rounding (tested in value and gradient).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

BUFFER_BYTES = (
    5 << 20
)  # of one unrolled piece; larger ones fall out of the cache (measured at 2 to 40 MiB)


def _pieces(batch, height, width, depth, itemsize):
    """Images a piece: the largest divisor of the batch whose unrolled buffer stays within
    BUFFER_BYTES."""
    fit = max(1, BUFFER_BYTES // (height * width * depth * itemsize))
    return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fit)


def _split(x, n):
    return x.reshape(-1, n, *x.shape[1:])


def _unroll(x, k, padding, dilation, height, width):
    """Patches of [n, H, W, C] as [n * height * width, k * k * C]."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    shifts = [(i * dilation, j * dilation) for i in range(k) for j in range(k)]
    patches = jnp.concatenate([x[:, i : i + height, j : j + width] for i, j in shifts], -1)
    return lax.optimization_barrier(
        patches.reshape(-1, patches.shape[-1])
    )  # else fused into the product: slow


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x, kernel, padding, dilation):
    """Stride-1 convolution: x [B, H, W, C], kernel [k, k, C, O] -> [B, H', W', O]; zeros outside
    the image."""
    (batch, height, width, channels), (k, _, _, features) = x.shape, kernel.shape
    height, width = (size + 2 * padding - dilation * (k - 1) for size in (height, width))
    matrix = kernel.reshape(-1, features)
    n = _pieces(batch, height, width, k * k * channels, x.dtype.itemsize)

    def piece(x):
        return (_unroll(x, k, padding, dilation, height, width) @ matrix).reshape(
            n, height, width, features
        )

    return lax.map(piece, _split(x, n)).reshape(batch, height, width, features)


def _forward(x, kernel, padding, dilation):
    return conv(x, kernel, padding, dilation), (x, kernel)


def _backward(padding, dilation, residuals, dy):
    x, kernel = residuals
    return _input_gradient(dy, kernel, padding, dilation, x.shape), _kernel_gradient(
        x, dy, kernel, padding, dilation
    )


def _kernel_gradient(x, dy, kernel, padding, dilation):
    batch, height, width, features = dy.shape
    k = kernel.shape[0]
    n = _pieces(batch, height, width, k * k * x.shape[-1], x.dtype.itemsize)
    wide = jnp.promote_types(x.dtype, jnp.float32)  # sums of many pieces

    def add(total, piece):
        x, dy = piece
        patches = _unroll(x, k, padding, dilation, height, width)
        product = jnp.dot(patches.T, dy.reshape(-1, features), preferred_element_type=wide)
        return total + product, None

    zero = jnp.zeros((k * k * x.shape[-1], features), wide)
    total, _ = lax.scan(add, zero, (_split(x, n), _split(dy, n)))
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _input_gradient(dy, kernel, padding, dilation, shape):
    """One product for all k * k shifts, then the shifted sums."""
    batch, height, width, features = dy.shape
    k, channels = kernel.shape[0], kernel.shape[2]
    matrix = kernel.reshape(-1, features).T
    span = dilation * (k - 1)
    n = _pieces(batch, height, width, k * k * channels, dy.dtype.itemsize)
    wide = jnp.promote_types(dy.dtype, jnp.float32)

    def piece(dy):
        parts = lax.optimization_barrier(dy.reshape(-1, features) @ matrix)
        parts = parts.reshape(n, height, width, k * k, channels)
        total = 0
        for i in range(k):
            for j in range(k):
                down, right = i * dilation, j * dilation
                margin = ((0, 0), (down, span - down), (right, span - right), (0, 0))
                total = total + jnp.pad(parts[:, :, :, i * k + j].astype(wide), margin)
        total = total[:, padding : padding + shape[1], padding : padding + shape[2]]
        return total.astype(dy.dtype)

    return lax.map(piece, _split(dy, n)).reshape(shape)


conv.defvjp(_forward, _backward)
