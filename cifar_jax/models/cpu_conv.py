"""Convolution for one CPU: matrix products over pieces of the batch that fit in the cache.

XLA's CPU convolutions lose their data to memory at CIFAR shapes, most of all in the weight
gradient. Here 3 x 3 kernels go through Winograd's transform where there are channels enough;
otherwise each piece of a few images is unrolled to [pixels, k * k * C] (im2col) and multiplied. The
gradients are matrix products too. Equal to lax.conv_general_dilated up to rounding (tested in value
and gradient).
"""

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.models import winograd
from cifar_jax.models.channels import add_bias
from cifar_jax.models.pieces import cache_bytes, over_pieces, pad, pieces, split, zeros

BUFFER_BYTES = (
    5 << 20
)  # of one unrolled piece; larger ones leave the cache (measured at 2 to 40 MiB)
FEWEST = 16  # channels on both sides from which Winograd's transforms pay


def conv(x, kernel, bias, padding):
    """Stride-1 convolution: x [B, H, W, C], kernel [k, k, C, O], bias [O] or None ->
    [B, H', W', O]; zeros outside the image."""
    if kernel.shape[0] == 1 and not padding:
        return add_bias(bias, x @ kernel[0, 0])
    if kernel.shape[0] != 3 or min(kernel.shape[2:]) < FEWEST:
        return add_bias(bias, _unrolled(x, kernel, padding))
    if padding == 1 and max(x.shape[1:3]) <= 3:  # so much padding that leaving it out saves most
        return add_bias(bias, _shifted(x, kernel))
    return winograd.convolve(x, kernel, bias, padding)


def _overlap(tap, size):
    """(first, last + 1) of the rows that tap 0, 1 or 2 of a kernel padded by 1 sees, and of the
    rows that they add to."""
    first, last = max(0, tap - 1), min(size, size + tap - 1)
    return (first, last), (first + 1 - tap, last + 1 - tap)


def _taps(shape):
    """For each of the 3 x 3 taps: (i, j), the window of the image seen, the window written."""
    for i in range(3):
        for j in range(3):
            yield (i, j), *zip(_overlap(i, shape[0]), _overlap(j, shape[1]), strict=True)


def _window(x, ends):
    """A window of every image as a matrix [pixels, C]."""
    (top, bottom), (left, right) = ends
    return lax.optimization_barrier(x[:, top:bottom, left:right].reshape(-1, x.shape[-1]))


def _shifted_sum(x, kernel):
    """A product for each tap with the pixels that it sees, none with padding."""
    batch, height, width, _ = x.shape
    total = 0
    for (i, j), seen, ((top, bottom), (left, right)) in _taps((height, width)):
        part = _window(x, seen) @ kernel[i, j]
        part = part.reshape(batch, bottom - top, right - left, -1)
        margin = ((0, 0), (top, height - bottom), (left, width - right), (0, 0))
        total = total + pad(part, margin)
    return total


def _shifted_gradients(residuals, dy):
    x, kernel = residuals
    dx = _shifted_sum(dy, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    products = [
        jnp.dot(_window(x, seen).T, _window(dy, written))
        for _, seen, written in _taps(x.shape[1:3])
    ]
    return dx, jnp.stack(products).reshape(kernel.shape).astype(kernel.dtype)


_shifted = jax.custom_vjp(_shifted_sum)
_shifted.defvjp(lambda x, kernel: (_shifted_sum(x, kernel), (x, kernel)), _shifted_gradients)


def _images(x, pixels, values):
    """Of how many images the unrolled `pixels`, of so many `values` each, go in a piece."""
    return pieces(len(x), pixels * values * x.dtype.itemsize, cache_bytes(BUFFER_BYTES))


def _unroll(x, k, padding, height, width):
    """Patches of [n, H, W, C] as [n * height * width, k * k * C], made before their product: fused
    into it, they are slow. First the k columns of each, then the k rows, in longer stretches."""
    x = pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    columns = jnp.concatenate([x[:, :, j : j + width] for j in range(k)], -1)
    columns = lax.optimization_barrier(columns)
    patches = jnp.concatenate([columns[:, i : i + height] for i in range(k)], -1)
    return lax.optimization_barrier(patches.reshape(-1, patches.shape[-1]))


def _products(x, kernel, padding):
    k, _, channels, features = kernel.shape
    height, width = (size + 2 * padding - (k - 1) for size in x.shape[1:3])
    matrix = kernel.reshape(-1, features)

    def piece(x):
        out = _unroll(x, k, padding, height, width) @ matrix
        return out.reshape(-1, height, width, features)

    n = _images(x, height * width, k * k * channels)
    return over_pieces(piece, n, x, (height, width, features))


def _kernel_gradient(x, dy, kernel, padding):
    _, height, width, features = dy.shape
    k, _, channels, _ = kernel.shape
    n = _images(x, height * width, k * k * channels)
    wide = jnp.promote_types(x.dtype, jnp.float32)  # sums of many pieces

    def add(total, parts):
        x, dy = parts
        patches = _unroll(x, k, padding, height, width)
        product = jnp.dot(patches.T, dy.reshape(-1, features), preferred_element_type=wide)
        return total + product, None

    zero = zeros((k * k * channels, features), wide, dy)
    total, _ = lax.scan(add, zero, (split(x, n), split(dy, n)))
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _input_gradient(dy, kernel, padding, shape):
    """One product for all k * k shifts, then the shifted sums."""
    _, height, width, features = dy.shape
    k, _, channels, _ = kernel.shape
    matrix = kernel.reshape(-1, features).T
    wide = jnp.promote_types(dy.dtype, jnp.float32)

    def piece(dy):
        parts = lax.optimization_barrier(dy.reshape(-1, features) @ matrix)
        parts = parts.reshape(-1, height, width, k * k, channels)
        total = 0
        for i in range(k):
            for j in range(k):
                margin = ((0, 0), (i, k - 1 - i), (j, k - 1 - j), (0, 0))
                total = total + pad(parts[:, :, :, i * k + j].astype(wide), margin)
        total = total[:, padding : padding + shape[1], padding : padding + shape[2]]
        return total.astype(dy.dtype)

    n = _images(dy, height * width, k * k * channels)
    return over_pieces(piece, n, dy, shape[1:])


def _gradients(padding, residuals, dy):
    x, kernel = residuals
    dx = _input_gradient(dy, kernel, padding, x.shape)
    return dx, _kernel_gradient(x, dy, kernel, padding)


_unrolled = jax.custom_vjp(_products, nondiff_argnums=(2,))
_unrolled.defvjp(lambda x, kernel, p: (_products(x, kernel, p), (x, kernel)), _gradients)
