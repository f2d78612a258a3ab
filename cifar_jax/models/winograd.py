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

# Of one piece's transformed tiles. Large enough that XLA splits the transforms over the cores,
# small enough for the last-level cache (measured at 1 to 96 MiB).
TILE_BYTES = 16 << 20
KERNEL_GRADIENT_BYTES = 8 << 20
FEWEST_PIXELS = 4  # a side up to which m = 2 is faster in the kernel's gradient too


def pieces(count, cost, limit):
    """How many of `count` go in a piece: their largest divisor that costs no more than `limit` at
    `cost` each, or 1."""
    fit = max(1, limit // cost)
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= fit)


def over_pieces(piece, n, *arrays):
    """piece(*parts) for every n images of `arrays`, joined again."""
    if n == len(arrays[0]):
        # what comes before would be computed again in each of the 16 transforms
        return lax.optimization_barrier(piece(*lax.optimization_barrier(arrays)))
    arrays = [split(x, n) for x in arrays]

    def body(i, out):
        part = piece(*(lax.dynamic_index_in_dim(x, i, keepdims=False) for x in arrays))
        return lax.dynamic_update_index_in_dim(out, part, i, 0)

    part = jax.eval_shape(piece, *(x[0] for x in arrays))
    out = zeros((len(arrays[0]), *part.shape), part.dtype, arrays[0])
    out = lax.fori_loop(0, len(out), body, out)
    return out.reshape(-1, *out.shape[2:])


def zeros(shape, dtype, x):
    """Zeros made after `x`: else XLA makes them once for all steps of a loop around, and copies
    them in each."""
    zero, _ = lax.optimization_barrier((jnp.zeros((), dtype), x))
    return jnp.broadcast_to(zero, shape)


def split(x, n):
    """[B, ...] as [B / n, n, ...]."""
    return x.reshape(-1, n, *x.shape[1:])


# By m, where the polynomials behind the transforms are evaluated, infinity aside. 0, 1, -1, 2, -2,
# usual for m = 4, would make the sums five times less exact (measured).
POINTS = {2: (0, 1, -1), 4: (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)}
TURNED = (3, 1, 2, 0)  # the points of m = 2, infinity the last, as a kernel turned around has them


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


def _combine(weights, arrays):
    """The sum of `arrays` by `weights`; only what is not 0 or 1 costs a product."""
    terms = [
        (weight, abs(weight) * x if abs(weight) != 1 else x)
        for weight, x in zip(weights.tolist(), arrays, strict=True)
        if weight
    ]
    (sign, total), *rest = sorted(terms, key=lambda term: term[0] < 0)
    total = total if sign > 0 else -total
    for sign, term in rest:
        total = total + term if sign > 0 else total - term
    return total


def _both(matrix, rows):
    """The product with `matrix` along both axes of a list of lists of arrays."""
    columns = [
        [_combine(weights, column) for weights in matrix] for column in zip(*rows, strict=True)
    ]
    return [[_combine(weights, row) for weights in matrix] for row in zip(*columns, strict=True)]


def _kernel_tiles(kernel):
    """[3, 3, C, O] as 4 x 4 matrices [C, O]."""
    return _both(_transforms(2)[1], [[kernel[i, j] for j in range(3)] for i in range(3)])


def _data_tiles(x, padding, rows, columns, m=2):
    """The transformed tiles, m + 2 by m + 2, each [n * rows * columns, C], of images
    [n, H, W, C]."""
    n, height, width, channels = x.shape
    margin = [
        (padding, m * (count + 1) - size - padding)
        for count, size in ((rows, height), (columns, width))
    ]
    x = jnp.pad(x.astype(_wide(x)), ((0, 0), *margin, (0, 0)))
    x = x.reshape(n, rows + 1, m, columns + 1, m, channels)

    def tile(i, j):
        return x[:, i // m : i // m + rows, i % m, j // m : j // m + columns, j % m]

    tiles = [[tile(i, j) for j in range(m + 2)] for i in range(m + 2)]
    return [[_matrix(t) for t in row] for row in _both(_transforms(m)[2], tiles)]


def _matrix(x):
    """[..., C] as a matrix [rows, C], made before its product: fused into it, it is slow."""
    return lax.optimization_barrier(x.reshape(-1, x.shape[-1]))


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _convolve(x, tiles, padding, contract, output):
    """Images [B, H, W, C] by transformed kernels, whose axis `contract` is summed over, with the
    output transform `output`."""
    batch, height, width, channels = x.shape
    features = tiles[0][0].shape[1 - contract]
    height, width = height + 2 * padding - 2, width + 2 * padding - 2
    rows, columns = -(-height // 2), -(-width // 2)
    image_bytes = 16 * rows * columns * (channels + features) * _wide(x).itemsize

    def piece(x):
        data = _data_tiles(x, padding, rows, columns)
        dimensions = (((1,), (contract,)), ((), ()))
        products = [
            [lax.dot_general(data[i][j], tiles[i][j], dimensions) for j in range(4)]
            for i in range(4)
        ]
        out = _both(output, products)
        shape = (-1, rows, columns, features)
        out = [jnp.stack([part.reshape(shape) for part in row], 3) for row in out]
        out = jnp.stack(out, 2).reshape(-1, 2 * rows, 2 * columns, features)
        return out[:, :height, :width].astype(x.dtype)

    return over_pieces(piece, pieces(batch, image_bytes, TILE_BYTES), x)


def convolve(x, kernel, padding):
    """x [B, H, W, C], kernel [3, 3, C, O] -> [B, H + 2 padding - 2, W + 2 padding - 2, O]."""
    return _convolve(x, _kernel_tiles(kernel.astype(_wide(x))), padding, 0, _transforms(2)[0])


def input_gradient(dy, kernel, padding):
    """The cotangent of `convolve`'s images: dy by the kernel turned by 180 degrees.

    Its polynomial is x^2 k(1 / x): at 1 and -1 the same, at 0 what k's is at infinity and the other
    way round, but for the sign in G. So these are the tiles of `convolve`, which XLA makes once.
    """
    tiles = _kernel_tiles(kernel.astype(_wide(dy)))
    turned = [[tiles[i][j] for j in TURNED] for i in TURNED]
    return _convolve(dy, turned, 2 - padding, 1, _transforms(2)[0] * (-1, 1, 1, -1))


def kernel_gradient(x, dy, padding):
    """The cotangent [3, 3, C, O] of `convolve`'s kernel."""
    batch, height, width, features = dy.shape
    channels = x.shape[-1]
    m = 2 if max(height, width) <= FEWEST_PIXELS else 4
    output, kernel, _ = _transforms(m)
    size = m + 2
    rows, columns = -(-height // m), -(-width // m)
    wide = _wide(x)
    tile_bytes = size**2 * wide.itemsize  # of a channel
    # the sums themselves are read and written once a piece
    limit = max(KERNEL_GRADIENT_BYTES, 2 * tile_bytes * channels * features)
    n = pieces(batch, tile_bytes * rows * columns * (channels + features), limit)

    def add(sums, parts):
        x, dy = parts
        data = _data_tiles(x, padding, rows, columns, m)
        margin = ((0, 0), (0, m * rows - height), (0, m * columns - width), (0, 0))
        dy = jnp.pad(dy.astype(wide), margin).reshape(n, rows, m, columns, m, features)
        out = _both(output.T, [[dy[:, :, a, :, b] for b in range(m)] for a in range(m)])
        return [
            [total + d.T @ _matrix(o) for total, d, o in zip(*row, strict=True)]
            for row in zip(sums, data, out, strict=True)
        ], None

    sums = [[zeros((channels, features), wide, dy)] * size] * size
    sums, _ = lax.scan(add, sums, (split(x, n), split(dy, n)))
    # one product, and no part of what follows: XLA would compute it again in every use
    sums = lax.optimization_barrier(jnp.stack([x.reshape(-1) for row in sums for x in row]))
    back = jnp.asarray(np.kron(kernel, kernel).T, wide)
    return jnp.dot(back, sums, precision="highest").reshape(3, 3, channels, features)
