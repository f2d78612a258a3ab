"""A batch in pieces that stay in a CPU's cache, one after the other."""

import jax
import jax.numpy as jnp
from jax import lax

SHARE = 8  # of what fits in the last-level cache; measured at 1 to 50


def cache_bytes(limit):
    """`limit`, of a piece for all cores, in the last-level cache; a device that is but one core has
    a smaller cache to itself."""
    return limit if jax.device_count() == 1 else limit // SHARE


def pieces(count, cost, limit):
    """How many of `count` go in a piece: their largest divisor that costs no more than `limit` at
    `cost` each, or 1."""
    fit = max(1, limit // cost)
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= fit)


def over_pieces(piece, n, x, shape):
    """piece(part) [n, *shape] for every n images of `x`, joined again."""
    if n == len(x):
        # what comes before would be computed again in each kernel of the transforms
        return lax.optimization_barrier(piece(lax.optimization_barrier(x)))
    parts = split(x, n)

    def body(i, out):
        part = piece(lax.dynamic_index_in_dim(parts, i, keepdims=False))
        return lax.dynamic_update_index_in_dim(out, part, i, 0)

    out = zeros((len(parts), n, *shape), x.dtype, parts)
    return lax.fori_loop(0, len(out), body, out).reshape(-1, *shape)


def zeros(shape, dtype, x):
    """Zeros made after `x`: else XLA makes them once for all steps of a loop around, and copies
    them in each."""
    zero, _ = lax.optimization_barrier((jnp.zeros((), dtype), x))
    return jnp.broadcast_to(zero, shape)


def pad(x, margin):
    """x with zeros around, margin's (before, after) along each axis."""
    return lax.pad(x, x.dtype.type(0), [(*ends, 0) for ends in margin])


def split(x, n):
    """[B, ...] as [B / n, n, ...]."""
    return x.reshape(-1, n, *x.shape[1:])
