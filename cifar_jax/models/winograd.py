"""3 x 3 convolution by Winograd's F(m x m, 3 x 3): (m + 2)^2 matrix products for m x m outputs, not
9 m^2 of them.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). m is 2, and
4 in the kernel's gradient, which needs no transform of what comes out by pixel (that of 4 is slow
in XLA). In float32 about as exact as the direct form. Made for a CPU: the batch goes through in
pieces whose transformed tiles stay in the cache. Arithmetic is in float32 (float64 stays float64)
whatever the dtype of the images.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.polynomial import polynomial

from cifar_jax.models.channels import add_bias
from cifar_jax.models.pieces import cache_bytes, over_pieces, pad, pieces, split, zeros

# Of one piece's transformed tiles. Large enough that XLA splits the transforms over the cores,
# small enough for the last-level cache (measured at 1 to 96 MiB).
TILE_BYTES = 16 << 20
KERNEL_GRADIENT_BYTES = 8 << 20
FEWEST_PIXELS = 4  # a side up to which m = 2 is faster in the kernel's gradient too


# By m, where the polynomials behind the transforms are evaluated: 0, then pairs of both signs; the
# last point, infinity, is not named. 0, 1, -1, 2, -2, usual for m = 4, would make the sums five
# times less exact (measured).
POINTS = {2: (0, 1, -1), 4: (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)}


@functools.cache
def _transforms(m):
    """(A [m, m + 2], G [m + 2, 3], B [m + 2, m + 2]): the output, kernel and data transforms of the
    paper are products with A, G and B, the latter two transposed there."""
    points = np.array(POINTS[m])
    others = [np.delete(points, i) for i in range(len(points))]
    scales = [np.prod(point - rest) for point, rest in zip(points, others, strict=True)]
    infinity = np.eye(m + 2)[-1:]
    output = np.concatenate([points ** np.arange(m)[:, None], infinity.T[-m:]], 1)
    kernel = np.concatenate([points[:, None] ** np.arange(3) / np.c_[scales], infinity[:, -3:]])
    data = np.zeros((m + 2, m + 2))
    for i, rest in enumerate(others):
        data[i, :-1] = polynomial.polyfromroots(rest)
    data[-1] = polynomial.polyfromroots(points)
    return output, kernel, data


# Along each axis the points of a transformed tile are kept in two parts, the pairs and the ends, 0
# and infinity; so tiles are four arrays [rows' points, columns' points, ...], in lists
# [rows' part][columns' part]. Within an array every value is a sum of the same few terms, by
# weights from a table: one kernel for XLA to compile, not one for each point.
def _parts(m):
    """The points of the pairs and of the ends, as indices."""
    return slice(1, m + 1), slice(0, None, m + 1)


def _weighted(table, arrays):
    """[row of the table, ...]: the sum of `arrays` by each row."""
    rows = len(table), *arrays[0].shape

    def product(weights, x):
        weights = lax.broadcast_in_dim(weights.astype(x.dtype), rows, (0,))
        return lax.mul(weights, lax.broadcast(x, rows[:1]))

    return _sum(product(*pair) for pair in zip(table.T, arrays, strict=True))


def _sum(arrays):
    return functools.reduce(lax.add, arrays)  # jnp's operators take longer to trace


def _tiles(x, lines, rows_axis, columns_axis):
    """The four parts, each as matrices [rows' * columns' points, tiles, C] (made before their
    product: fused into it, they are slow), by `lines`, the transform along one axis."""
    parts = [lines(y, rows_axis + 1) for y in lines(x, columns_axis)]
    return [
        [lax.optimization_barrier(y.reshape(len(y) * y.shape[1], -1, y.shape[-1])) for y in row]
        for row in zip(*parts, strict=True)
    ]


def _kernel_tiles(kernel):
    """The four parts, each [points, C, O], of a kernel [3, 3, C, O] for m = 2."""
    matrix = _transforms(2)[1]

    def lines(x, axis):
        taps = [lax.index_in_dim(x, k, axis, keepdims=False) for k in range(3)]
        return [_weighted(matrix[part], taps) for part in _parts(2)]

    parts = _tiles(kernel.reshape(3, 3, -1), lines, 0, 1)
    return [[y.reshape(-1, *kernel.shape[2:]) for y in row] for row in parts]


def _data_tiles(x, padding, rows, columns, m=2, turned=False):
    """The four parts, each [points, n * rows * columns, C], of images [n, H, W, C]; `turned`: the
    ends the other way round."""
    n, height, width, channels = x.shape
    margin = [
        (padding, m * (count + 1) - size - padding)
        for count, size in ((rows, height), (columns, width))
    ]
    x = pad(x.astype(_wide(x)), ((0, 0), *margin, (0, 0)))
    x = x.reshape(n, rows + 1, m, columns + 1, m, channels)
    matrix = _transforms(m)[2]

    def lines(x, axis):
        count = x.shape[axis] - 1

        def pixels(k, size):
            """[..., count, size, ...]: of every tile the k-th pixel and those after it."""
            x_k = lax.slice_in_dim(x, k // m, k // m + count, axis=axis)
            return lax.slice_in_dim(x_k, k % m, k % m + size, axis=axis + 1)

        inner = [lax.squeeze(pixels(k, 1), [axis + 1]) for k in range(1, m + 1)]
        pairs = _weighted(matrix[1:-1, 1:-1], inner)
        # infinity's polynomial is that of 0 times x: the same weights, one pixel on
        ends = _sum(float(matrix[0, k]) * pixels(k, 2) for k in range(0, m + 1, 2))
        ends = jnp.moveaxis(ends, axis + 1, 0)
        return pairs, ends[::-1] if turned else ends

    return _tiles(x, lines, 1, 3)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _convolve(x, tiles, padding, contract, turned, bias=None):
    """Images [B, H, W, C] by a transformed kernel, whose axis `contract`, 1 or 2, is summed over,
    plus bias; `turned`: by the kernel turned by 180 degrees."""
    batch, height, width, channels = x.shape
    features = tiles[0][0].shape[3 - contract]
    height, width = height + 2 * padding - 2, width + 2 * padding - 2
    rows, columns = -(-height // 2), -(-width // 2)
    image_bytes = 16 * rows * columns * (channels + features) * _wide(x).itemsize

    def output(pairs, ends):
        """Along the first axis the two pixels, from the points in both parts."""
        (plus, minus), (zero, infinity) = pairs, ends
        if turned:
            zero, infinity = -infinity, -zero
        return plus + minus + zero, plus - minus + infinity

    def multiply(data, tiles):
        dimensions = (((2,), (contract,)), ((0,), (0,)))
        product = lax.dot_general(data, tiles, dimensions)
        return product.reshape(2, 2, -1, rows, columns, features)

    def piece(x):
        data = _data_tiles(x, padding, rows, columns, turned=turned)
        products = jax.tree.map(multiply, data, tiles)
        lines = [jnp.stack(output(*parts), 1) for parts in zip(*products, strict=True)]
        # the bias while they are in the cache
        halves = [add_bias(bias, y.transpose(1, 2, 0, 3, 4)) for y in output(*lines)]
        # [n, rows, 2, columns, 2, O]; stacked, for XLA would make a sum by weights again in every
        # use of it, or on one core while it puts it in place
        out = jnp.stack(halves, 4)
        out = out.reshape(-1, 2 * rows, 2 * columns, features)
        return out[:, :height, :width].astype(x.dtype)

    n = pieces(batch, image_bytes, cache_bytes(TILE_BYTES))
    return over_pieces(piece, n, x, (height, width, features))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def convolve(x, kernel, bias, padding):
    """x [B, H, W, C], kernel [3, 3, C, O], bias [O] or None ->
    [B, H + 2 padding - 2, W + 2 padding - 2, O]."""
    return _forward(x, kernel, bias, padding)[0]


def _forward(x, kernel, bias, padding):
    tiles = _kernel_tiles(kernel.astype(_wide(x)))
    return _convolve(x, tiles, padding, 1, turned=False, bias=bias), (x, tiles, bias)


def _backward(padding, residuals, dy):
    """The images' cotangent is dy by the kernel turned by 180 degrees.

    Its polynomial is x^2 k(1 / x): at 1 and -1 the same, at 0 what k's is at infinity and the other
    way round, but for the sign in G. So its tiles are the kernel's own; the data's ends and what
    comes out at them change places.
    """
    x, tiles, bias = residuals
    dx = _convolve(dy, tiles, 2 - padding, 2, turned=True)
    dkernel, dbias = _kernel_gradient(x, dy, padding)
    return dx, dkernel.astype(x.dtype), None if bias is None else dbias.astype(bias.dtype)


convolve.defvjp(_forward, _backward)


def _kernel_gradient(x, dy, padding):
    """The cotangents [3, 3, C, O] of `convolve`'s kernel and [O] of its bias."""
    batch, height, width, features = dy.shape
    channels = x.shape[-1]
    m = 2 if max(height, width) <= FEWEST_PIXELS else 4
    output, kernel, _ = _transforms(m)
    rows, columns = -(-height // m), -(-width // m)
    wide = _wide(x)
    tile_bytes = (m + 2) ** 2 * wide.itemsize  # of a channel
    # the sums themselves are read and written once a piece
    limit = max(cache_bytes(KERNEL_GRADIENT_BYTES), 2 * tile_bytes * channels * features)
    n = pieces(batch, tile_bytes * rows * columns * (channels + features), limit)

    def lines(y, axis):
        pixels = [lax.index_in_dim(y, k, axis, keepdims=False) for k in range(m)]
        # at 0 the first of the m pixels is left, at infinity the last
        ends = lax.slice_in_dim(y, 0, m, stride=m - 1, axis=axis)
        return _weighted(output.T[1:-1], pixels), jnp.moveaxis(ends, axis, 0)

    def add(totals, parts):
        sums, dbias = totals
        x, dy = parts
        dbias = dbias + dy.sum((0, 1, 2), wide)
        margin = ((0, 0), (0, m * rows - height), (0, m * columns - width), (0, 0))
        dy = pad(dy.astype(wide), margin).reshape(n, rows, m, columns, m, features)
        data, out = _data_tiles(x, padding, rows, columns, m), _tiles(dy, lines, 2, 4)
        dimensions = (((1,), (1,)), ((0,), (0,)))
        sums = jax.tree.map(
            lambda total, d, o: total + lax.dot_general(d, o, dimensions), sums, data, out
        )
        return (sums, dbias), None

    # of each part, the kernel's transform [points, 9]
    back = [[np.kron(kernel[i], kernel[j]) for j in _parts(m)] for i in _parts(m)]
    sums = [[zeros((len(b), channels, features), wide, dy) for b in row] for row in back]
    totals = sums, zeros((features,), wide, dy)
    (sums, dbias), _ = lax.scan(add, totals, (split(x, n), split(dy, n)))
    sums = jnp.concatenate([total.reshape(len(total), -1) for row in sums for total in row])
    # one product, and no part of what follows: XLA would compute it again in every use
    sums = lax.optimization_barrier(sums)
    back = jnp.asarray(np.concatenate([b for row in back for b in row]).T, wide)
    dkernel = jnp.dot(back, sums, precision="highest").reshape(3, 3, channels, features)
    return dkernel, dbias
