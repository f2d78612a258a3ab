"""Augmentation on the device: pure functions (key, images) -> images, batched, made to be jitted.

Images are float32 [B, H, W, 3] in 0..255 until `normalize`. Each random operation draws its own
numbers for each image and then calls a deterministic function (rotate, translate, ...) that the
tests hold against Pillow value by value where Pillow has it, else against plain NumPy.
`make_augment` composes operations by name in the order given.
"""

import jax
import jax.numpy as jnp
from jax import random

from cifar_jax import InputError

# ------------------------------------------------------------------------------------------------
# geometry


def _color(value, images):
    """A number or one a channel as an array that broadcasts with images [B, H, W, C]."""
    return jnp.asarray(value, images.dtype).reshape(1, 1, 1, -1)


def _window(padded, top, left, height, width):
    """Cut [height, width] out of each padded image at its own integer corner (top[B], left[B])."""

    def cut(image, y, x):
        return jax.lax.dynamic_slice(image, (y, x, 0), (height, width, image.shape[-1]))

    return jax.vmap(cut)(padded, top, left)


def _gather(images, ys, xs, fill):
    """Pixels at integer positions ys, xs [B, H, W]; outside the image `fill` (also by channel)."""
    batch, height, width, channels = images.shape
    inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
    index = jnp.clip(ys, 0, height - 1) * width + jnp.clip(xs, 0, width - 1)
    flat = images.reshape(batch, height * width, channels)
    pixels = jnp.take_along_axis(flat, index.reshape(batch, -1, 1), axis=1).reshape(
        *index.shape, channels
    )
    return jnp.where(inside[..., None], pixels, _color(fill, images))


def _centred_grid(height, width):
    """Pixel-centre coordinates relative to the image centre: ys, xs float32 [H, W]."""
    ys = jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2
    xs = jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2
    return jnp.meshgrid(ys, xs, indexing="ij")


def flip(images, mask):
    """Mirror left to right where mask [B] is true."""
    return jnp.where(mask[:, None, None, None], images[:, :, ::-1], images)


def rotate(images, degrees, fill=0.0):
    """Rotate counter-clockwise by degrees [B], nearest neighbour (Pillow's Image.rotate)."""
    ys, xs = (grid[None] for grid in _centred_grid(*images.shape[1:3]))
    angle = jnp.deg2rad(degrees)[:, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    source_x = jnp.floor(cos * xs - sin * ys + images.shape[2] / 2).astype(jnp.int32)
    source_y = jnp.floor(sin * xs + cos * ys + images.shape[1] / 2).astype(jnp.int32)
    return _gather(images, source_y, source_x, fill)


def translate(images, dy, dx, limit):
    """Move by whole pixels dy, dx [B] (|d| <= limit), zeros coming in."""
    padded = jnp.pad(images, ((0, 0), (limit, limit), (limit, limit), (0, 0)))
    return _window(padded, limit - dy, limit - dx, *images.shape[1:3])


def shift_scale_rotate(images, degrees, scale, dy, dx, fill=0.0):
    """Scale, rotate counter-clockwise, shift by dy, dx pixels; all [B]; bilinear, rounded.

    The matrix of OpenCV's getRotationMatrix2D (Albumentations' ShiftScaleRotate) and exact weights;
    OpenCV's warpAffine rounds places and weights of uint8 images, which moves a value now and then
    by some levels of 255.
    """
    height, width = images.shape[1:3]
    ys, xs = (grid[None] for grid in _centred_grid(height, width))
    degrees, scale, dy, dx = (v[:, None, None] for v in (degrees, scale, dy, dx))
    sin, cos = jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))
    source_x = (cos * (xs - dx) - sin * (ys - dy)) / scale + (width - 1) / 2
    source_y = (sin * (xs - dx) + cos * (ys - dy)) / scale + (height - 1) / 2
    x0, y0 = jnp.floor(source_x), jnp.floor(source_y)
    wx, wy = (source_x - x0)[..., None], (source_y - y0)[..., None]
    x0, y0 = x0.astype(jnp.int32), y0.astype(jnp.int32)
    top = _gather(images, y0, x0, fill) * (1 - wx) + _gather(images, y0, x0 + 1, fill) * wx
    bottom = (
        _gather(images, y0 + 1, x0, fill) * (1 - wx) + _gather(images, y0 + 1, x0 + 1, fill) * wx
    )
    return jnp.floor(top * (1 - wy) + bottom * wy + 0.5)


def cut_hole(images, top, left, height, width, mask, fill):
    """Fill the rectangle at (top, left) of size (height, width), int [B], where mask [B]."""
    rows, columns = jnp.arange(images.shape[1])[None], jnp.arange(images.shape[2])[None]
    in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    hole = in_rows[:, :, None] & in_columns[:, None, :] & mask[:, None, None]
    return jnp.where(hole[..., None], _color(fill, images), images)


# ------------------------------------------------------------------------------------------------
# colour


def _blend(degenerate, images, factor, uint8):
    """degenerate + factor * (images - degenerate) in 0..255; if uint8 cut as Pillow does."""
    mixed = degenerate + factor[:, None, None, None] * (images - degenerate)
    return jnp.clip(jnp.floor(mixed) if uint8 else mixed, 0.0, 255.0)


def _grey(images, uint8):
    """Luma [B, H, W, 1]; with uint8 Pillow's fixed-point 'L', else torchvision's for tensors."""
    if uint8:
        r, g, b = (images[..., i].astype(jnp.int32) for i in range(3))
        return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).astype(images.dtype)[..., None]
    luma = jnp.array([0.2989, 0.587, 0.114], images.dtype)
    return (images * luma.reshape(1, 1, 1, 3)).sum(-1, keepdims=True)


def adjust_brightness(images, factor, uint8=True):
    """Blend with black by factor [B]; 1 leaves the image as it is."""
    return _blend(jnp.zeros_like(images), images, factor, uint8)


def adjust_contrast(images, factor, uint8=True):
    """Blend with the image's mean grey by factor [B]."""
    mean = _grey(images, uint8).mean((1, 2, 3), keepdims=True)
    return _blend(jnp.floor(mean + 0.5) if uint8 else mean, images, factor, uint8)


def adjust_saturation(images, factor, uint8=True):
    """Blend with the grey version by factor [B]."""
    return _blend(_grey(images, uint8), images, factor, uint8)


def adjust_hue(images, shift, uint8=True):
    """Turn the hue by shift [B], a share of the colour circle in -0.5..0.5.

    With uint8 hue and saturation have 256 levels and results are whole numbers: Pillow's HSV mode.
    """
    maximum, minimum = images.max(-1), images.min(-1)
    spread = maximum - minimum
    safe = jnp.where(spread > 0, spread, 1.0)
    r, g, b = ((maximum - images[..., i]) / safe for i in range(3))
    red, green = images[..., 0] == maximum, images[..., 1] == maximum
    hue = jnp.where(red, b - g, jnp.where(green, 2.0 + r - b, 4.0 + g - r)) / 6.0 % 1.0
    hue = jnp.where(spread > 0, hue, 0.0)
    saturation = spread / jnp.where(maximum > 0, maximum, 1.0)
    shift = shift[:, None, None]
    if uint8:
        steps = (jnp.floor(hue * 255.0) + jnp.trunc(shift * 255.0)) % 256.0
        hue, saturation = steps / 255.0, jnp.floor(saturation * 255.0) / 255.0
    else:
        hue = (hue + shift) % 1.0
    sector = jnp.floor(hue * 6.0)
    fraction = hue * 6.0 - sector
    p = maximum * (1.0 - saturation)
    q = maximum * (1.0 - saturation * fraction)
    t = maximum * (1.0 - saturation * (1.0 - fraction))
    if uint8:
        p, q, t = (jnp.floor(v + 0.5) for v in (p, q, t))
    sector = sector.astype(jnp.int32)[..., None] % 6
    rgb = [
        (maximum, t, p),
        (q, maximum, p),
        (p, maximum, t),
        (p, q, maximum),
        (t, p, maximum),
        (maximum, p, q),
    ]
    choices = [jnp.stack(c, -1) for c in rgb]
    return jnp.select([sector == i for i in range(6)], choices)


def adjust_brightness_contrast(images, contrast, brightness):
    """images * contrast + 255 * brightness, both [B], cut to whole numbers (Albumentations)."""
    mixed = images * contrast[:, None, None, None] + 255.0 * brightness[:, None, None, None]
    return jnp.floor(jnp.clip(mixed, 0.0, 255.0))


# ------------------------------------------------------------------------------------------------
# random operations


def normalize(key, images, *, mean, std):
    """(images / 255 - mean) / std per channel; no randomness."""
    del key
    return (images / 255.0 - _color(mean, images)) / _color(std, images)


def random_flip(key, images, *, p=0.5):
    """Mirror left to right with probability p."""
    return flip(images, random.bernoulli(key, p, images.shape[:1]))


def random_crop(key, images, *, padding, mode="constant"):
    """Pad every side, then cut the original size at a uniform integer offset 0..2 * padding.

    Modes: 'constant' (zeros), 'reflect' = 'reflect_101' (the edge pixel not repeated: torchvision's
    'reflect' and OpenCV's BORDER_REFLECT_101), 'symmetric' (the edge pixel repeated).
    """
    mode = {"reflect_101": "reflect"}.get(mode, mode)
    if mode not in ("constant", "reflect", "symmetric"):
        raise InputError(
            f"unknown padding mode {mode!r}; choose constant, reflect, reflect_101 or symmetric"
        )
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode=mode)
    top, left = random.randint(key, (2, images.shape[0]), 0, 2 * padding + 1)
    return _window(padded, top, left, *images.shape[1:3])


def random_rotation(key, images, *, degrees):
    """Rotate by U(-degrees, degrees), black outside (torchvision's RandomRotation)."""
    return rotate(images, random.uniform(key, images.shape[:1], minval=-degrees, maxval=degrees))


def random_translation(key, images, *, fraction):
    """Move by round(U(-fraction, fraction) * size) pixels an axis (torchvision's RandomAffine)."""
    height, width = images.shape[1:3]
    limit = round(fraction * max(height, width))
    span = fraction * jnp.array([[height], [width]], jnp.float32)
    shift = random.uniform(key, (2, images.shape[0]), minval=-1.0) * span
    dy, dx = jnp.round(shift).astype(jnp.int32)
    return translate(images, dy, dx, limit)


def random_shift_scale_rotate(key, images, *, shift, scale, degrees, fill=0.0, p=0.5):
    """With probability p: zoom by U(*scale), rotate by U(-degrees, degrees), shift by
    U(-shift, shift) of the size."""
    draw, batch = random.split(key, 4), images.shape[:1]
    angle = random.uniform(draw[0], batch, minval=-degrees, maxval=degrees)
    zoom = random.uniform(draw[1], batch, minval=scale[0], maxval=scale[1])
    dy, dx = random.uniform(draw[2], (2, *batch), minval=-shift, maxval=shift)
    moved = shift_scale_rotate(
        images, angle, zoom, dy * images.shape[1], dx * images.shape[2], fill
    )
    return jnp.where(random.bernoulli(draw[3], p, batch)[:, None, None, None], moved, images)


def color_jitter(key, images, *, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, uint8=True):
    """Brightness, contrast, saturation by U(1 - v, 1 + v), hue by U(-v, v), in an order by image.

    torchvision's ColorJitter: with uint8 as it acts on Pillow images, without as on float tensors.
    0 leaves one out.
    """
    jitters = [
        (adjust_brightness, max(0.0, 1 - brightness), 1 + brightness, brightness),
        (adjust_contrast, max(0.0, 1 - contrast), 1 + contrast, contrast),
        (adjust_saturation, max(0.0, 1 - saturation), 1 + saturation, saturation),
        (adjust_hue, -hue, hue, hue),
    ]
    jitters = [(adjust, low, high) for adjust, low, high, strength in jitters if strength > 0]
    batch = images.shape[0]
    order_key, *keys = random.split(key, 1 + len(jitters))
    amounts = [
        random.uniform(k, (batch,), minval=j[1], maxval=j[2])
        for k, j in zip(keys, jitters, strict=True)
    ]
    ranks = random.uniform(order_key, (batch, len(jitters)))
    order = jnp.argsort(ranks, axis=1)  # order[b, i]: which jitter image b gets in place i
    for place in range(len(jitters)):
        results = [j[0](images, amount, uint8) for j, amount in zip(jitters, amounts, strict=True)]
        chosen = order[:, place, None, None, None]
        images = jnp.select([chosen == i for i in range(len(jitters))], results)
    return images


def random_brightness_contrast(key, images, *, brightness=0.2, contrast=0.2, p=0.2):
    """With probability p contrast by 1 + U(-contrast, contrast), brightness by U(-brightness,
    brightness) of the whole range (Albumentations)."""
    draw, batch = random.split(key, 3), images.shape[:1]
    gain = 1.0 + random.uniform(draw[0], batch, minval=-contrast, maxval=contrast)
    offset = random.uniform(draw[1], batch, minval=-brightness, maxval=brightness)
    changed = adjust_brightness_contrast(images, gain, offset)
    return jnp.where(random.bernoulli(draw[2], p, batch)[:, None, None, None], changed, images)


def coarse_dropout(key, images, *, min_size, max_size, fill=0.0, p=0.5):
    """With probability p: one hole within the image, its sides each in min_size..max_size."""
    draw, batch = random.split(key, 3), images.shape[:1]
    height, width = random.randint(draw[0], (2, *batch), min_size, max_size + 1)
    place = random.uniform(draw[1], (2, *batch))
    top = jnp.floor(place[0] * (images.shape[1] - height + 1)).astype(jnp.int32)
    left = jnp.floor(place[1] * (images.shape[2] - width + 1)).astype(jnp.int32)
    return cut_hole(images, top, left, height, width, random.bernoulli(draw[2], p, batch), fill)


OPERATIONS = {
    f.__name__: f
    for f in (
        normalize,
        random_flip,
        random_crop,
        random_rotation,
        random_translation,
        random_shift_scale_rotate,
        color_jitter,
        random_brightness_contrast,
        coarse_dropout,
    )
}


# They clip or round to what a pixel can be.
BEFORE_NORMALIZE = (
    "normalize",
    "color_jitter",
    "random_brightness_contrast",
    "random_shift_scale_rotate",
)


def make_augment(*, ops, **params):
    """Compose OPERATIONS in the order of `ops`; params[name] holds each one's keywords.

    Returns augment(key, images u8 or float [B, H, W, 3] in 0..255) -> float32 images. Each
    operation gets its own key, folded from its place in the order. Raises InputError for an unknown
    operation, or one of BEFORE_NORMALIZE that comes after it.
    """
    unknown = [name for name in ops if name not in OPERATIONS]
    if unknown:
        raise InputError(
            f"unknown augmentation {unknown[0]!r}; choose from {', '.join(OPERATIONS)}"
        )
    normalized = ops.index("normalize") if "normalize" in ops else len(ops)
    wrong = [name for name in ops[normalized + 1 :] if name in BEFORE_NORMALIZE]
    if wrong:
        raise InputError(f"{wrong[0]!r} works on values in 0..255: it comes before 'normalize'")
    chain = [(OPERATIONS[name], dict(params.get(name, {}))) for name in ops]

    def augment(key, images):
        images = images.astype(jnp.float32)
        for place, (operation, keywords) in enumerate(chain):
            images = operation(random.fold_in(key, place), images, **keywords)
        return images

    return augment
