"""3 x 3 convolution by Winograd's F(2 x 2, 3 x 3): 16 matrix products for 2 x 2 outputs, not 36.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). In float32
as exact as the direct form: the transforms only add, and halve the kernel. Made for a CPU: the
batch goes through in pieces whose transformed tiles stay in the cache. Arithmetic is in float32
(float64 stays float64) whatever the dtype of the images.
"""

import jax.numpy as jnp
from jax import lax

# Of one piece's transformed tiles. Large enough that XLA splits the transforms over the cores,
# small enough for the last-level cache (measured at 1 to 96 MiB).
TILE_BYTES = 16 << 20
KERNEL_GRADIENT_BYTES = 8 << 20


def pieces(batch, image_bytes, limit):
    """Images a piece: the largest divisor of the batch whose buffers stay within `limit`."""
    fit = max(1, limit // image_bytes)
    return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fit)


def over_pieces(piece, n, *arrays):
    """piece(*parts) for every n images of `arrays`, joined again."""
    if n == len(arrays[0]):
        # what comes before would be computed again in each of the 16 transforms
        return lax.optimization_barrier(piece(*lax.optimization_barrier(arrays)))
    out = lax.map(lambda parts: piece(*parts), tuple(split(x, n) for x in arrays))
    return out.reshape(-1, *out.shape[2:])


def split(x, n):
    """[B, ...] as [B / n, n, ...]."""
    return x.reshape(-1, n, *x.shape[1:])


# The transforms of the paper along one axis, of lists of arrays.


def _data(d):  # B^T d, 4 -> 4
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _kernel(k):  # G k, 3 -> 4
    return [k[0], (k[0] + k[1] + k[2]) / 2, (k[0] - k[1] + k[2]) / 2, k[2]]


def _kernel_back(u):  # G^T u, 4 -> 3
    return [u[0] + (u[1] + u[2]) / 2, (u[1] - u[2]) / 2, (u[1] + u[2]) / 2 + u[3]]


def _output(m):  # A^T m, 4 -> 2
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _output_back(y):  # A y, 2 -> 4
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _both(transform, rows):
    """`transform` along both axes of a list of lists."""
    columns = [transform(column) for column in zip(*rows, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]


def _kernel_tiles(kernel):
    """[3, 3, C, O] as 4 x 4 matrices [C, O]."""
    return _both(_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])


def _data_tiles(x, padding, rows, columns):
    """The 4 x 4 transformed tiles, each [n * rows * columns, C], of images [n, H, W, C]."""
    n, height, width, channels = x.shape
    margin = [
        (padding, 2 * (count + 1) - size - padding)
        for count, size in ((rows, height), (columns, width))
    ]
    x = jnp.pad(x.astype(_wide(x)), ((0, 0), *margin, (0, 0)))
    x = x.reshape(n, rows + 1, 2, columns + 1, 2, channels)

    def tile(i, j):
        return x[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]

    tiles = _both(_data, [[tile(i, j) for j in range(4)] for i in range(4)])
    return [[_matrix(t) for t in row] for row in tiles]


def _matrix(x):
    """[..., C] as a matrix [rows, C], made before its product: fused into it, it is slow."""
    return lax.optimization_barrier(x.reshape(-1, x.shape[-1]))


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _convolve(x, tiles, padding, contract):
    """Images [B, H, W, C] by transformed kernels, whose axis `contract` is summed over."""
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
        out = _both(_output, products)
        shape = (-1, rows, columns, features)
        out = [jnp.stack([part.reshape(shape) for part in row], 3) for row in out]
        out = jnp.stack(out, 2).reshape(-1, 2 * rows, 2 * columns, features)
        return out[:, :height, :width].astype(x.dtype)

    return over_pieces(piece, pieces(batch, image_bytes, TILE_BYTES), x)


def convolve(x, kernel, padding):
    """x [B, H, W, C], kernel [3, 3, C, O] -> [B, H + 2 padding - 2, W + 2 padding - 2, O]."""
    return _convolve(x, _kernel_tiles(kernel.astype(_wide(x))), padding, 0)


def input_gradient(dy, kernel, padding):
    """The cotangent of `convolve`'s images: dy by the kernel turned by 180 degrees."""
    return _convolve(dy, _kernel_tiles(kernel[::-1, ::-1].astype(_wide(dy))), 2 - padding, 1)


def kernel_gradient(x, dy, padding):
    """The cotangent [3, 3, C, O] of `convolve`'s kernel."""
    batch, height, width, features = dy.shape
    channels = x.shape[-1]
    rows, columns = -(-height // 2), -(-width // 2)
    wide = _wide(x)
    image_bytes = 16 * rows * columns * (channels + features) * wide.itemsize
    # the sums themselves are read and written once a piece
    limit = max(KERNEL_GRADIENT_BYTES, 2 * 16 * channels * features * wide.itemsize)
    n = pieces(batch, image_bytes, limit)

    def add(sums, parts):
        x, dy = parts
        data = _data_tiles(x, padding, rows, columns)
        margin = ((0, 0), (0, 2 * rows - height), (0, 2 * columns - width), (0, 0))
        dy = jnp.pad(dy.astype(wide), margin).reshape(n, rows, 2, columns, 2, features)
        out = _both(_output_back, [[dy[:, :, a, :, b] for b in range(2)] for a in range(2)])
        return [
            [sums[i][j] + data[i][j].T @ _matrix(out[i][j]) for j in range(4)] for i in range(4)
        ], None

    zeros = [[jnp.zeros((channels, features), wide)] * 4] * 4
    sums, _ = lax.scan(add, zeros, (split(x, n), split(dy, n)))
    return jnp.stack([jnp.stack(row) for row in _both(_kernel_back, sums)])
