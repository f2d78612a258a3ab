"""Layers the families share: flax.linen modules with PyTorch's defaults, images as [B, H, W, C].

Parameters and running statistics are float32 whatever the compute dtype is (float64 stays float64).
"""

import contextlib
import contextvars
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.models import cpu_conv
from cifar_jax.models.channels import add_bias, per_channel
from cifar_jax.models.pieces import pad, pieces, split

PIECE = 32  # images evaluated at a time on a CPU device; measured at 16 to 512


def uniform_fan_in(fan_in):
    """Initializer U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's for weights and biases alike."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def identity_first(init):
    """Initializer of a kernel [k, k, C, O], k odd, whose first C filters pass on their input.

    As torch.nn.init.dirac_ on the first C filters; the others come from `init`.
    """

    def wrapped(key, shape, dtype=jnp.float32):
        k, _, channels, features = shape
        n = min(channels, features)
        kernel = init(key, shape, dtype).at[..., :n].set(0)
        return kernel.at[k // 2, k // 2, jnp.arange(n), jnp.arange(n)].set(1)

    return wrapped


_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_convolutions():
    """While entered, `convolve` traces XLA's own convolution on every backend (to count FLOPs)."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def _alone(function, x, *whole):
    return function(x, *whole)


_spread = contextvars.ContextVar("spread", default=None)


@contextlib.contextmanager
def shares_of_devices(spread):
    """While entered, several CPU devices run what was made for one, each on its share of a batch
    split over them: `spread` is sharding.make_spread's."""
    token = _spread.set(spread)
    try:
        yield
    finally:
        _spread.reset(token)


def _on_cpu():
    """How a function (x, *whole) made for one CPU device runs here, as a function of it and its
    arguments; None on other devices, and on several of whose shares nobody spoke."""
    if jax.default_backend() != "cpu" or _plain.get():
        return None
    return _spread.get() or (_alone if jax.device_count() == 1 else None)


def in_pieces(function, x):
    """function(x) [B, N], whose rows depend on one image of x [B, H, W, C] each.

    On a CPU device in pieces of its batch: a piece's maps stay in the cache and in memory that the
    process has, where those of a large batch are had anew from the system in every call.
    """
    run = _on_cpu()
    if run is None:
        return function(x)

    def by_pieces(x):
        n = pieces(len(x), 1, PIECE)
        with shares_of_devices(_alone):
            if n == len(x) or n < PIECE // 4:  # many pieces of a few images are slower
                return function(x)
            return lax.map(function, split(x, n)).reshape(len(x), -1)

    return run(by_pieces, x)


def block_diagonal(kernel, groups):
    """A grouped kernel [k, k, C / groups, O] as one of all channels, [k, k, C, O].

    On a CPU its zeros cost less than small products do; over many devices XLA would gather the
    images of all to make the gradient of a grouped kernel (tests/scaling_test.py).
    """
    k, _, channels, features = kernel.shape
    blocks = kernel.reshape(k, k, channels, groups, features // groups)
    eye = jnp.eye(groups, dtype=kernel.dtype)
    full = jnp.einsum("ijcgf,hg->ijhcgf", blocks, eye)
    return full.reshape(k, k, groups * channels, features)


def convolve(x, kernel, padding, dilation=1, groups=1, bias=None):
    """Stride-1 convolution of x [B, H, W, C] with kernel [k, k, C / groups, O], plus bias [O].

    On a CPU device by cpu_conv; elsewhere, and for a map of one row or column, by XLA's own: with
    in_pieces all that depends on the backend. Groups and dilation are made into plain convolutions
    first. Raises ValueError for a map that the kernel does not fit in.
    """
    reach = dilation * (kernel.shape[0] - 1) + 1
    if min(x.shape[1:3]) + 2 * padding < reach:
        raise ValueError(_too_small(x, f"a convolution that reaches over {reach} x {reach}"))
    if groups > 1 and not _plain.get():
        kernel, groups = block_diagonal(kernel, groups), 1
    if dilation > 1 and not _plain.get():
        return _by_phases(x, kernel, padding, dilation, bias)
    # a map of one row has taps that see nothing, which cpu_conv does not know
    run = _on_cpu()
    if run and min(x.shape[1:3]) > 1:
        return run(functools.partial(cpu_conv.conv, padding=padding), x, kernel, bias)
    x = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return add_bias(bias, x)


def _by_phases(x, kernel, padding, dilation, bias):
    """A dilated kernel sees each phase of the pixel grid by itself: the phases become images.

    XLA would make its gradient a convolution with stride and a kernel of the map's size, which it
    does not hand to cuDNN as the weight gradient that it is.
    """
    batch, height, width, channels = x.shape
    k, _, _, features = kernel.shape
    out = [size + 2 * padding - dilation * (k - 1) for size in (height, width)]
    whole = [-(-(size + 2 * padding) // dilation) for size in (height, width)]
    margin = [
        (padding, n * dilation - size - padding)
        for n, size in zip(whole, (height, width), strict=True)
    ]
    x = pad(x, ((0, 0), *margin, (0, 0)))
    x = x.reshape(batch, whole[0], dilation, whole[1], dilation, channels)
    x = x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, *whole, channels)
    y = convolve(x, kernel, 0, bias=bias)
    rows, columns = y.shape[1:3]
    y = y.reshape(batch, dilation, dilation, rows, columns, features).transpose(0, 3, 1, 4, 2, 5)
    y = y.reshape(batch, rows * dilation, columns * dilation, features)
    return y[:, : out[0], : out[1]]


def _too_small(x, what):
    return f"the images are too small: a map of {x.shape[1]} x {x.shape[2]} comes to {what}"


class Conv(nn.Module):
    """Square stride-1 convolution, as torch.nn.Conv2d: symmetric padding, dilation, groups.

    `identity` starts the kernel with filters that pass on their input (identity_first).
    Parameters: kernel [k, k, C / groups, features], bias [features].
    """

    features: int
    kernel_size: int = 3
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = True
    identity: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        k, channels = self.kernel_size, x.shape[-1] // self.groups
        init = uniform_fan_in(k * k * channels)
        kernel_init = identity_first(init) if self.identity else init
        kernel = self.param("kernel", kernel_init, (k, k, channels, self.features))
        bias = self.param("bias", init, (self.features,)) if self.use_bias else None
        return convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.padding,
            self.dilation,
            self.groups,
            bias,
        )


class Dense(nn.Module):
    """Fully connected, as torch.nn.Linear. Parameters: kernel [in, features], bias [features]."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        init = uniform_fan_in(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,)) if self.use_bias else None
        return add_bias(bias, x.astype(self.dtype) @ kernel.astype(self.dtype))


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as torch.nn.BatchNorm2d.

    flax.linen.BatchNorm keeps the biased variance in its running statistics, PyTorch the unbiased
    one (n / (n - 1)); `unbiased=False` gives Flax's. `momentum` is the share of the old running
    value (PyTorch's 1 - momentum). Under `jit` with the batch sharded over devices the statistics
    are those of the global batch (synchronised BatchNorm). `use_scale=False` leaves the scale at 1.
    Variables: params scale, bias; batch_stats mean, var.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    unbiased: bool = True
    use_scale: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features) if self.use_scale else 1
        bias = self.param("bias", nn.initializers.zeros, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            var = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0.0)
            if not self.is_initializing():
                n = x.size // x.shape[-1]
                correction = n / max(n - 1, 1) if self.unbiased else 1.0
                m = self.momentum
                running_mean.value = m * running_mean.value + (1 - m) * mean
                running_var.value = m * running_var.value + (1 - m) * correction * var
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        factor, offset = (per_channel(v, x) for v in (factor, bias - mean * factor))
        return (wide * factor + offset).astype(self.dtype)


def _window_maxima(x, size):
    if min(x.shape[1:3]) < size:
        raise ValueError(_too_small(x, f"a {size} x {size} pool"))
    lowest = jnp.array(-jnp.inf, x.dtype)
    return lax.reduce_window(x, lowest, lax.max, (1, size, size, 1), (1, size, size, 1), "VALID")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x, size):
    """Max over size x size windows, floor mode: [B, H, W, C] -> [B, H/size, W/size, C].

    Its gradient goes to the first maximum of each window in row order, as PyTorch's does, by
    comparison with the maximum instead of XLA's select-and-scatter, which is slow on CPU and GPU
    and not deterministic on GPU. Raises ValueError for a map smaller than a window.
    """
    return _window_maxima(x, size)


def _max_pool_forward(x, size):
    y = _window_maxima(x, size)
    return y, (x, y)


def _max_pool_backward(size, residuals, dy):
    x, y = residuals
    (batch, height, width, channels), (rows, columns) = x.shape, y.shape[1:3]
    windows = x[:, : rows * size, : columns * size].reshape(
        batch, rows, size, columns, size, channels
    )
    first = jnp.full(y.shape, size * size, jnp.int32)  # of its window; none is the maximum of a NaN
    for k in reversed(range(size * size)):
        first = jnp.where(windows[:, :, k // size, :, k % size] == y, k, first)
    order = jnp.arange(size * size).reshape(1, 1, size, 1, size, 1)
    dx = jnp.where(first[:, :, None, :, None] == order, dy[:, :, None, :, None], 0)
    dx = dx.reshape(batch, rows * size, columns * size, channels)
    margin = ((0, 0), (0, height - rows * size), (0, width - columns * size), (0, 0))
    return (jnp.pad(dx, margin),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def avg_pool(x, size):
    """Mean over size x size windows, floor mode: [B, H, W, C] -> [B, H/size, W/size, C].

    Raises ValueError for a map smaller than a window.
    """
    if min(x.shape[1:3]) < size:
        raise ValueError(_too_small(x, f"a {size} x {size} pool"))
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    return x.reshape(batch, rows, size, columns, size, channels).mean((2, 4))
