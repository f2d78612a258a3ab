"""Image files as pixels."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from cifar_jax import InputError
from cifar_jax.images import files_of, read_image


@pytest.fixture
def photo(rng):
    """A smooth image, no symmetry in it."""
    small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    return small.resize((48, 64), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_what_is_up(orientation, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        upright = ImageOps.exif_transpose(image)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(upright))
        fitted = ImageOps.fit(upright, (20, 32), Image.Resampling.BICUBIC)
        found = read_image(tmp_path / "a.png", (32, 20)).astype(int)
    assert found.shape == (32, 20, 3)
    assert np.abs(found - np.asarray(fitted)).max() <= 2  # turned before or after scaling


@pytest.mark.parametrize("suffix", ["jp2", "tga", "ico", "qoi", "gif", "webp", "tiff"])
def test_other_formats(suffix, photo, tmp_path):
    photo.save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}", (32, 32)).shape == (32, 32, 3)


def test_sixteen_bits_are_not_white(photo, tmp_path):
    grey = np.asarray(photo.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(read_image(tmp_path / "16.png"), np.stack([grey] * 3, -1))


def test_files_are_sorted_and_hidden_ones_left_out(photo, tmp_path):
    for name in ("b/2.png", "b/1.txt", "a.png", ".hidden", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(path.relative_to(tmp_path)) for path in files_of(tmp_path)]
    assert found == ["a.png", "b/1.txt", "b/2.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no files"):
        files_of(tmp_path / "empty")
    with pytest.raises(InputError, match=r"c\.png \(No such file .*; did you mean 'a\.png'\?\)"):
        read_image(tmp_path / "c.png")
