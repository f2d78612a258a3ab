"""Each operation against Pillow, colorsys or numpy, value by value; the random ones also by
distribution."""

import colorsys
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cifar_jax import InputError, augment

N = 64


@pytest.fixture
def images(rng):
    """Random smooth and noisy uint8 images [N, 32, 32, 3]."""
    coarse = rng.integers(0, 256, (N, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    noise = rng.integers(-40, 41, (N, 32, 32, 3))
    return np.clip(coarse + noise, 0, 255).astype(np.uint8)


def floats(images):
    return jnp.asarray(images, jnp.float32)


def pillow(images, function):
    return np.stack(
        [np.asarray(function(Image.fromarray(image), i)) for i, image in enumerate(images)]
    )


def assert_levels(ours, theirs, share=0.0, levels=1):
    """Equal to the level, but for `share` of the values, which may be off by `levels` (float
    rounding at a step)."""
    difference = np.abs(np.asarray(ours, np.float64) - theirs)
    assert difference.max() <= levels
    assert (difference > 0).mean() <= share


def drawn(operation, seed, images, **settings):
    """What a random operation makes of images, compiled as the train step has it."""
    operation = jax.jit(functools.partial(operation, **settings))
    return np.asarray(operation(jax.random.key(seed), images))


def test_rotate_is_pillows(images, rng):
    degrees = rng.uniform(-180, 180, N)
    theirs = pillow(images, lambda image, i: image.rotate(degrees[i], Image.NEAREST))
    ours = np.asarray(augment.rotate(floats(images), jnp.asarray(degrees, jnp.float32)))
    # a source coordinate that falls on a pixel border within float32 may go either way
    assert (ours != theirs).any(-1).mean() < 2e-3


def test_translate_is_pillows(images, rng):
    dy, dx = rng.integers(-3, 4, (2, N))
    theirs = pillow(
        images,
        lambda image, i: image.transform(
            (32, 32), Image.AFFINE, (1, 0, -dx[i], 0, 1, -dy[i]), Image.NEAREST
        ),
    )
    np.testing.assert_array_equal(
        augment.translate(floats(images), jnp.asarray(dy), jnp.asarray(dx), 3), theirs
    )


def reference_warp(image, degrees, scale, dy, dx, fill):
    """OpenCV's definition in plain Python: the matrix of getRotationMatrix2D about the pixel centre
    (15.5, 15.5) plus the shift, inverted, sampled bilinearly with a constant border, rounded."""
    angle = math.radians(degrees)
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    c = 15.5
    matrix = np.array(
        [[a, b, (1 - a) * c - b * c + dx], [-b, a, b * c + (1 - a) * c + dy], [0, 0, 1]]
    )
    inverse = np.linalg.inv(matrix)
    padded = np.full((34, 34, 3), fill, np.float64)
    padded[1:33, 1:33] = image
    out = np.full(image.shape, fill, np.float64)
    for y in range(32):
        for x in range(32):
            sx, sy, _ = inverse @ (x, y, 1)
            x0, y0 = math.floor(sx), math.floor(sy)
            if -1 <= x0 < 32 and -1 <= y0 < 32:
                wx, wy = sx - x0, sy - y0
                quad = padded[y0 + 1 : y0 + 3, x0 + 1 : x0 + 3]
                top = quad[0, 0] * (1 - wx) + quad[0, 1] * wx
                bottom = quad[1, 0] * (1 - wx) + quad[1, 1] * wx
                out[y, x] = math.nan if np.isnan(top).any() else top * (1 - wy) + bottom * wy
    return np.floor(out + 0.5)


@pytest.mark.parametrize("scale", [(1.9, 2.1), (0.5, 0.8)])
def test_shift_scale_rotate_is_a_bilinear_warp(images, rng, scale):
    n = 12
    degrees, zoom = rng.uniform(-7, 7, n), rng.uniform(*scale, n)
    dy, dx = rng.uniform(-3.2, 3.2, (2, n))
    ours = augment.shift_scale_rotate(
        floats(images[:n]),
        *(jnp.asarray(v, jnp.float32) for v in (degrees, zoom, dy, dx)),
        fill=1.0,
    )
    theirs = np.stack(
        [reference_warp(images[i], degrees[i], zoom[i], dy[i], dx[i], 1.0) for i in range(n)]
    )
    assert_levels(ours, theirs, share=1e-3)


@pytest.mark.parametrize(
    ("adjust", "enhance"),
    [
        (augment.adjust_brightness, ImageEnhance.Brightness),
        (augment.adjust_contrast, ImageEnhance.Contrast),
        (augment.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_blends_are_pillows(images, rng, adjust, enhance):
    factor = rng.uniform(0.5, 1.5, N).astype(np.float32)
    theirs = pillow(images, lambda image, i: enhance(image).enhance(float(factor[i])))
    assert_levels(adjust(floats(images), jnp.asarray(factor)), theirs, share=1e-3)


def test_hue_is_pillows_hsv(images, rng):
    shift = rng.uniform(-0.5, 0.5, N)

    def turn(image, i):
        h, s, v = image.convert("HSV").split()
        turned = np.asarray(h) + np.array(int(shift[i] * 255)).astype(np.uint8)
        return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), s, v)).convert("RGB")

    ours = augment.adjust_hue(floats(images), jnp.asarray(shift, jnp.float32))
    difference = np.abs(np.asarray(ours, np.float64) - pillow(images, turn))
    assert (difference > 0).mean() < 2e-3  # a hue on a level's border may fall to its neighbour
    assert difference.max() <= 8


def test_hue_without_levels_is_colorsys(images, rng):
    shift = rng.uniform(-0.5, 0.5, 4)
    ours = augment.adjust_hue(floats(images[:4]), jnp.asarray(shift, jnp.float32), uint8=False)
    for i in range(4):
        for y, x in rng.integers(0, 32, (40, 2)):
            h, s, v = colorsys.rgb_to_hsv(*(images[i, y, x] / 255))
            theirs = np.array(colorsys.hsv_to_rgb((h + shift[i]) % 1.0, s, v)) * 255
            np.testing.assert_allclose(ours[i, y, x], theirs, atol=2e-2)


def test_float_brightness_clamps_without_rounding(images):
    ours = augment.adjust_brightness(floats(images), jnp.full(N, 1.37), uint8=False)
    np.testing.assert_allclose(ours, np.minimum(images * np.float32(1.37), 255.0), rtol=1e-6)


def test_brightness_contrast_is_a_lookup_table(images, rng):
    gain, offset = rng.uniform(0.8, 1.2, N), rng.uniform(-0.2, 0.2, N)
    theirs = []
    for i in range(N):
        table = np.arange(256, dtype=np.float32) * np.float32(gain[i]) + np.float32(
            offset[i]
        ) * np.float32(255)
        theirs.append(np.clip(table, 0, 255).astype(np.uint8)[images[i]])
    ours = augment.adjust_brightness_contrast(
        *(jnp.asarray(v, jnp.float32) for v in (images, gain, offset))
    )
    assert_levels(ours, np.stack(theirs), share=1e-3)


def test_normalize(images):
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    ours = augment.normalize(None, floats(images), mean=mean, std=std)
    np.testing.assert_allclose(ours, (images / 255 - np.array(mean)) / np.array(std), atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "numpy_mode"),
    [
        ("constant", "constant"),
        ("reflect", "reflect"),
        ("reflect_101", "reflect"),
        ("symmetric", "symmetric"),
    ],
)
def test_crop_is_a_window_of_the_padded_image(images, mode, numpy_mode):
    cropped = drawn(augment.random_crop, 0, floats(images), padding=4, mode=mode)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode=numpy_mode)
    for i in range(N):
        windows = [
            (padded[i, y : y + 32, x : x + 32] == cropped[i]).all()
            for y in range(9)
            for x in range(9)
        ]
        assert any(windows)


def ramp(n):
    """Images whose pixel (y, x) tells its own place: channels y, x, 200; [n, 32, 32, 3]."""
    y, x = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    return jnp.asarray(
        np.broadcast_to(np.stack([y, x, np.full_like(y, 200)], -1), (n, 32, 32, 3)), jnp.float32
    )


def uniform_counts(values, choices):
    """Assert that each of `choices` is drawn equally often, within 5 standard deviations, and
    nothing else is."""
    counts = np.array([(values == c).sum() for c in choices])
    n, p = len(values), 1 / len(choices)
    assert counts.sum() == n
    assert np.abs(counts - n * p).max() <= 5 * math.sqrt(n * p * (1 - p))


def test_crop_offsets_are_uniform():
    n = 8000
    cropped = drawn(augment.random_crop, 1, ramp(n), padding=4)
    uniform_counts(cropped[:, 16, 16, 0], np.arange(12, 21))
    uniform_counts(cropped[:, 16, 16, 1], np.arange(12, 21))
    assert abs(np.corrcoef(cropped[:, 16, 16, 0], cropped[:, 16, 16, 1])[0, 1]) < 0.05


def test_flip_half_of_the_images():
    flipped = drawn(augment.random_flip, 2, ramp(8000))
    uniform_counts(flipped[:, 0, 0, 1], [0, 31])


def test_translation_rounds_a_uniform_shift():
    n = 20000
    moved = drawn(augment.random_translation, 3, ramp(n), fraction=0.1)
    down, right = (16 - moved[:, 16, 16, axis] for axis in (0, 1))
    for shifts in (down, right):
        assert set(np.unique(shifts)) == set(range(-3, 4))
        assert abs((np.abs(shifts) == 3).mean() - 2 * 0.7 / 6.4) < 0.01  # U(-3.2, 3.2) rounded
        assert abs((shifts == 0).mean() - 1 / 6.4) < 0.01
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.03
    black = moved[..., 2] == 0  # comes in
    np.testing.assert_array_equal(black[:, 0, 16], down > 0)
    np.testing.assert_array_equal(black[:, 31, 16], down < 0)
    np.testing.assert_array_equal(black[:, 16, 0], right > 0)
    np.testing.assert_array_equal(black[:, 16, 31], right < 0)


def test_rotation_angles_are_uniform():
    n = 4000
    turned = drawn(augment.random_rotation, 4, ramp(n), degrees=30.0)
    # the row a point 12 right of the centre comes from moves by 12 sin(angle): +-6 at most
    rows = turned[:, 16, 28, 0][turned[:, 16, 28, 2] > 0]
    assert 21 <= rows.max() <= 23 and 9 <= rows.min() <= 11
    assert abs(rows.mean() - 16) < 0.3


@pytest.mark.parametrize(("sizes", "p"), [((8, 8), 0.5), ((2, 5), 0.5)])
def test_coarse_dropout_is_one_inside_hole(sizes, p):
    n = 12000
    white = jnp.full((n, 32, 32, 3), 200.0)
    settings = {"min_size": sizes[0], "max_size": sizes[1], "fill": (1.0, 2.0, 3.0), "p": p}
    holes = drawn(augment.coarse_dropout, 5, white, **settings)
    black = holes[..., 0] == 1.0
    np.testing.assert_array_equal(holes[black], np.broadcast_to([1.0, 2.0, 3.0], (black.sum(), 3)))
    rows, columns = black.any(2), black.any(1)
    hit = black.any((1, 2))
    assert abs(hit.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert (black.sum((1, 2)) == rows.sum(1) * columns.sum(1)).all()  # a full rectangle
    heights, widths = rows[hit].sum(1), columns[hit].sum(1)
    for extent in (heights, widths):
        uniform_counts(extent, np.arange(sizes[0], sizes[1] + 1))
    top, left = rows[hit].argmax(1), columns[hit].argmax(1)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.07
    if sizes[0] == sizes[1]:
        uniform_counts(top, np.arange(33 - sizes[0]))
        uniform_counts(left, np.arange(33 - sizes[0]))
    else:
        assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.07


def test_color_jitter_orders_are_uniform_and_factors_in_range():
    """Brightness and contrast do not commute: with fixed factors the result tells the order."""
    rng = np.random.default_rng(0)
    n = 4000
    image = np.broadcast_to(rng.integers(60, 200, (8, 8, 3)), (n, 8, 8, 3))
    out = drawn(augment.color_jitter, 6, floats(image), brightness=0.5, uint8=False)
    factor = out.mean((1, 2, 3)) / image[0].mean()
    inside = factor < 1.2  # no pixel of 200 is clamped there
    assert 0.5 <= factor.min() < 0.51 and abs(inside.mean() - 0.7) < 0.05

    orders = []
    for key in jax.random.split(jax.random.key(7), 5):
        _, *keys = jax.random.split(key, 3)
        b = jax.random.uniform(keys[0], (n,), minval=0.7, maxval=1.3)
        c = jax.random.uniform(keys[1], (n,), minval=0.7, maxval=1.3)
        first = augment.adjust_contrast(augment.adjust_brightness(floats(image), b), c)
        second = augment.adjust_brightness(augment.adjust_contrast(floats(image), c), b)
        out = augment.color_jitter(key, floats(image), brightness=0.3, contrast=0.3)
        is_first = (out == first).all((1, 2, 3))
        is_second = (out == second).all((1, 2, 3))
        assert (is_first | is_second).all()
        orders.append(np.asarray(is_first & ~is_second).mean())
    assert abs(np.mean(orders) - 0.5) < 0.05


def test_color_jitter_draws_saturation_and_hue():
    n = 4000
    pink = jnp.broadcast_to(jnp.array([200.0, 100.0, 100.0]), (n, 2, 2, 3))
    out = drawn(augment.color_jitter, 6, pink, saturation=0.3, uint8=False)
    grey = 0.2989 * 200 + 0.587 * 100 + 0.114 * 100
    factor = (out[:, 0, 0, 0] - grey) / (200 - grey)
    assert 0.7 <= factor.min() < 0.71 and 1.29 < factor.max() <= 1.3
    assert abs(factor.mean() - 1) < 0.02
    red = jnp.broadcast_to(jnp.array([200.0, 0.0, 0.0]), (n, 2, 2, 3))
    out = drawn(augment.color_jitter, 7, red, hue=0.1, uint8=False)
    # of a sixth of the circle green (or blue, the other way) is as far as the hue has turned
    turned = (out[:, 0, 0, 1] - out[:, 0, 0, 2]) / 200 / 6
    assert -0.1 <= turned.min() < -0.098 and 0.098 < turned.max() <= 0.1
    assert abs(turned.mean()) < 0.005


def test_shift_scale_rotate_draws_each_by_itself():
    """A shift of a tenth of the size, on both axes; an angle of seven degrees; see below for the
    scale."""
    n = 4000
    still = {"shift": 0.0, "scale": (1.0, 1.0), "degrees": 0.0, "fill": 1.0, "p": 1.0}

    def source(seed, row, column, **moving):
        """Where the pixel at (row, column) came from in each image."""
        out = drawn(augment.random_shift_scale_rotate, seed, ramp(n), **{**still, **moving})
        return out[:, row, column, 0], out[:, row, column, 1]

    down, right = source(10, 16, 16, shift=0.1)
    for place in (down, right):  # 16 + U(-3.2, 3.2), rounded
        uniform = np.abs(place - 16)
        assert uniform.max() == 3 and abs((uniform == 0).mean() - 1 / 6.4) < 0.03
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.07
    rows, _ = source(11, 16, 28, degrees=7.0)  # 12.5 right of the centre: +-12.5 sin(7 degrees)
    assert {15, 16, 17} <= {*np.unique(rows)} <= {14, 15, 16, 17, 18}
    assert abs(rows.mean() - 16) < 0.1 and 0.7 < rows.std() < 1.1


def test_shift_scale_rotate_touches_half():
    n = 4000
    settings = {"shift": 0.1, "scale": (1.9, 2.1), "degrees": 7.0, "fill": 1.0, "p": 0.5}
    out = drawn(augment.random_shift_scale_rotate, 8, ramp(n), **settings)
    touched = (out != np.asarray(ramp(1))).any((1, 2, 3))
    assert abs(touched.mean() - 0.5) < 0.04
    span = (
        out[touched][:, 16, 31, 1] - out[touched][:, 16, 0, 1]
    )  # 31 pixels show 31 / zoom of the source
    assert span.min() > 31 / 2.1 - 1.5 and span.max() < 31 / 1.9 + 1.5


def test_brightness_contrast_touches_a_fifth():
    n = 8000
    image = jnp.broadcast_to(jnp.arange(50.0, 178.0, 4.0)[None, None, :, None], (n, 32, 32, 3))
    out = drawn(augment.random_brightness_contrast, 9, image)
    touched = (out != np.asarray(image)).any((1, 2, 3))
    assert abs(touched.mean() - 0.2) < 0.025
    gain = (out[:, 0, 20, 0] - out[:, 0, 10, 0]) / 40
    assert 0.77 < gain.min() < 0.85 and 1.15 < gain.max() < 1.23
    offset = out[touched, 0, 10, 0] - gain[touched] * 90  # a fifth of 255, cut to whole values
    assert -53 < offset.min() < -47 and 45 < offset.max() < 53
    assert abs(np.corrcoef(gain[touched], offset)[0, 1]) < 0.1


def test_chain_is_pure_and_refuses_unknown_names(images):
    chain = augment.make_augment(
        ops=("random_crop", "normalize"),
        random_crop={"padding": 4},
        normalize={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        random_flip={"p": 1.0},  # not in ops: unused
    )
    first = jax.jit(chain)(jax.random.key(0), images)
    np.testing.assert_array_equal(first, jax.jit(chain)(jax.random.key(0), images))
    assert (first != jax.jit(chain)(jax.random.key(1), images)).any()
    assert first.dtype == jnp.float32 and first.shape == images.shape
    with pytest.raises(InputError, match="unknown augmentation 'blur'"):
        augment.make_augment(ops=("blur",))
