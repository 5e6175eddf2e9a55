"""Tests of image files: limits that hold before an image is decoded, and decoded pixels."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mhmoe_ray.data.images.files import TooManyPixelsError, check_image_file, count_scans, decode_image
from tests.support.images import bomb, encode_image, jpeg_of_scans, tiff_of_tile


def test_a_bomb_is_not_decoded():
    tracemalloc.start()
    # Pillow would warn above its own limit, and refuse above twice that, if the spec allowed more.
    for side in (12_000, 30_000):
        with pytest.raises(TooManyPixelsError, match=f"{side:,} x {side:,}"):
            check_image_file(bomb(side, side), 50_000_000)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_images_within_the_limits_are_decoded():
    """A JPEG file may have several scans, and its comments may contain the bytes with which a scan starts."""
    for extra_scans in (0, 20):
        content = jpeg_of_scans(extra_scans)
        assert count_scans(content) == content.count(b"\xff\xda") - 200
        assert check_image_file(content, 50_000_000).size == (24, 24)
    assert check_image_file(tiff_of_tile(16), 50_000_000).size == (4, 4)


def test_decode_image_is_rgb_upright_and_opaque():
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, 0] = 255, 0, 0, 255
    pixels[1, 2] = 0, 0, 0, 128
    decoded = np.asarray(decode_image(encode_image(pixels)))
    assert decoded.shape == (2, 3, 3)
    assert decoded[0, 0].tolist() == [255, 0, 0]
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert decoded[1, 2].tolist() == [127, 127, 127]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.asarray(decode_image(encode_image(pixels[:, :, :3], exif=exif.tobytes())))
    assert turned.shape == (3, 2, 3)
    assert turned[0, 1].tolist() == [255, 0, 0]
    grey = np.array([[0, 256 * 100, 65535]], np.uint16)
    assert np.asarray(decode_image(encode_image(grey)))[0, :, 0].tolist() == [0, 100, 255]
    palette = io.BytesIO()
    Image.fromarray(pixels[:, :, 3]).convert("P").save(palette, "gif", transparency=0)
    assert np.asarray(decode_image(palette.getvalue()))[1, 0].tolist() == [255, 255, 255]
    cmyk = io.BytesIO()
    Image.new("CMYK", (4, 4)).save(cmyk, "jpeg")
    assert decode_image(cmyk.getvalue()).mode == "RGB"
