"""Image files: the check of their content, and their decoding to RGB (Pillow, extra `pictures`)."""

import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mhmoe_ray.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
"""Suffixes of image files, the preferred ones first."""
# Pillow knows more formats. Some of them start other programs (EPS), and data sets of pictures use none of them.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


_ORIENTATION = 0x0112
"""EXIF tag that says how an image must be turned."""
_FIRST_SIDE_ORIENTATION = 5
"""Smallest orientation of an image that lies on its side; the larger ones, up to 8, do, too."""


class ImageError(Exception):
    """Error of an image file that cannot be used; its text is the detail."""


class NotImageError(ImageError):
    """Error of a file that is no image of a known format."""


class TooManyPixelsError(ImageError):
    """Error of an image with more pixels than the limit."""


class DamagedImageError(ImageError):
    """Error of an image that cannot be decoded."""


def require_pillow() -> None:
    """Check that Pillow is installed.

    Raises:
        DataError: it is missing.
    """
    if importlib.util.find_spec("PIL") is None:
        raise DataError("sources with images", "the package pillow is missing", "pip install 'mhmoe-ray[pictures]'")


def decode_image(content: bytes) -> "Image.Image":
    """Return the image in a file as RGB: turned as its EXIF data say, and with white where it is transparent.

    The file must be one that `check_image_file` accepts. Of an animation, this is the first frame.
    """
    with _open_image(content) as image:
        return _to_rgb(image)


def check_image_file(content: bytes, max_pixels: int) -> "Image.Image":
    """Check that `decode_image` decodes an image file, and return its result.

    An image with too many pixels is never decoded: its size is in its header.

    Args:
        content: the content of the file.
        max_pixels: largest number of pixels.

    Raises:
        ImageError: the file cannot be used; the class says why.
    """
    require_pillow()
    from PIL import UnidentifiedImageError

    try:
        with _open_image(content) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise TooManyPixelsError(f"{width:,} x {height:,}")
            if image.format == "PNG":
                # Decoding ignores the checksums of a PNG file's chunks. `verify` checks them and closes the image.
                image.verify()
        return decode_image(content)
    except ImageError:
        raise
    except UnidentifiedImageError as e:
        raise NotImageError from e
    # Pillow's decoders raise exceptions of many classes for damaged files, also SyntaxError and struct.error.
    except Exception as e:
        raise DamagedImageError(" ".join(str(e).split())[:200]) from e


def image_size(content: bytes) -> tuple[int, int]:
    """Return the width and the height of the image that `decode_image` returns, from the header of its file."""
    with _open_image(content) as image:
        width, height = image.size
        is_on_side = image.getexif().get(_ORIENTATION, 1) >= _FIRST_SIDE_ORIENTATION
        return (height, width) if is_on_side else (width, height)


@contextmanager
def _open_image(content: bytes) -> "Iterator[Image.Image]":
    """Open an image file and read its header, without warnings about its content."""
    from PIL import Image

    # Readers have a limit of their own (data.images.max_megapixels), which they check before they decode anything.
    # Pillow's limit would only warn, or refuse images that a spec allows.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        # Pillow warns about oddities of files that it decodes all the same, such as damaged EXIF data.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            yield image


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "white")
        background.alpha_composite(rgba)
        return background.convert("RGB")
    if image.mode.startswith("I"):
        # Grey values of 16 bits are divided by 256. Pillow's own conversion would make all above 255 white.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGB")
