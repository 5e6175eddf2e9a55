"""Image files: the check of their content, and their decoding to RGB (Pillow, extra `pictures`)."""

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mhmoe_ray.errors import DataError
from mhmoe_ray.spec.formats import FORMATS

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = tuple(suffix.removeprefix(".") for suffix in FORMATS["images"].suffixes)
"""Suffixes of image files without their dots, the preferred ones first."""
# Pillow knows more formats. Some of them start other programs (EPS), and data sets of images use none of them.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

# Pillow's tables for resizing grow with the longer side, so a limit on the number of pixels does not bound them.
MAX_SIDE = 32_768
"""Largest height or width of an image in pixels."""
# Encoders write about ten scans, and 18 for CMYK. A scan of 20 megapixels takes up to 0.2 s.
MAX_SCANS = 30
"""Largest number of scans of a JPEG file, each of which decodes the whole image."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323
"""TIFF tags with the width and the height of tiles in pixels."""
_ORIENTATION = 0x0112
_SIDE_ORIENTATIONS = (5, 6, 7, 8)
"""EXIF orientations of an image on its side."""


class ImageError(Exception):
    """Error for an image file that cannot be used."""


class NotImageError(ImageError):
    """The file is not an image of a supported format."""


class TooManyPixelsError(ImageError):
    """The image has more pixels than the limit; the message is its size."""


class ImageLimitError(ImageError):
    """The image exceeds a fixed limit, which the message names."""


class DamagedImageError(ImageError):
    """The image file is damaged and cannot be decoded."""


def require_pillow() -> None:
    """Raise DataError if Pillow is missing."""
    if importlib.util.find_spec("PIL") is None:
        raise DataError("sources with images", "the package pillow is missing", "pip install 'mhmoe-ray[pictures]'")


def decode_image(content: bytes) -> "Image.Image":
    """Decode a checked file to RGB, upright by EXIF, with white for transparent pixels.

    An animation gives its first frame.
    """
    with _open_image(content) as image:
        return _to_rgb(image)


def check_image_file(content: bytes, max_pixels: int) -> "Image.Image":
    """Check and decode an image file; an unusable one raises a subclass of ImageError.

    An image of more than `max_pixels` in its header is never decoded.
    """
    require_pillow()
    from PIL import UnidentifiedImageError

    try:
        with _open_image(content) as image:
            _check_limits(image, content, max_pixels)
            if image.format == "PNG":
                # Decoding ignores the checksums of a PNG file's chunks. `verify` checks them and closes the image.
                image.verify()
        return decode_image(content)
    except ImageError:
        raise
    except UnidentifiedImageError as e:
        raise NotImageError from e
    # Pillow's decoders raise exceptions of many classes for damaged files, even SyntaxError and struct.error.
    except Exception as e:
        raise DamagedImageError(" ".join(str(e).split())[:200]) from e


def _check_limits(image: "Image.Image", content: bytes, max_pixels: int) -> None:
    """Raise ImageError by an image's header if its decoding would take too much memory or time."""
    from PIL.TiffImagePlugin import TiffImageFile

    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{width:,} x {height:,}")
    if max(width, height) > MAX_SIDE:
        raise ImageLimitError(f"its longest side has {max(width, height):,} pixels, more than {MAX_SIDE:,}")
    if isinstance(image, TiffImageFile):
        # Libtiff decodes whole tiles, however small the image is.
        tile_width, tile_height = (int(image.tag_v2.get(tag, 1)) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        if tile_width * tile_height > max_pixels:
            raise TooManyPixelsError(f"tiles of {tile_width:,} x {tile_height:,}")
    elif content.startswith(b"\xff\xd8") and (scans := count_scans(content)) > MAX_SCANS:
        raise ImageLimitError(f"it has {scans:,} scans, more than {MAX_SCANS}")


# In the data of a scan, the byte FF is followed by 00 or by the code of a restart marker (D0 to D7), so the pattern
# excludes these. It also excludes FF, which may be repeated before any marker.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_FIRST_SEGMENT = 0xC0
"""Smallest code of a marker that may begin a segment; decoders skip smaller ones or end with an error."""
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA


def count_scans(content: bytes) -> int:
    """Return the number of scans that a decoder reads from a JPEG file, without decoding it.

    A decoder works through the whole image for each scan, so a small file may take hours.
    """
    scans, position = 0, 0
    while (match := _MARKER.search(content, position)) and (marker := match[1][0]) != _END_OF_IMAGE:
        position = match.end()
        if marker >= _FIRST_SEGMENT and marker != _START_OF_IMAGE:
            # A segment starts with its length, by which it is skipped, because it may contain bytes that look like
            # markers, such as those of a preview in EXIF data.
            position += int.from_bytes(content[position : position + 2])
        scans += marker == _START_OF_SCAN
    return scans


def image_size(content: bytes) -> tuple[int, int]:
    """Return width and height of the decoded image in pixels, from its file's header."""
    with _open_image(content) as image:
        width, height = image.size
        # The tag may have any type. As in `ImageOps.exif_transpose`, other values than these change nothing.
        is_on_side = image.getexif().get(_ORIENTATION) in _SIDE_ORIENTATIONS
        return (height, width) if is_on_side else (width, height)


@contextmanager
def _open_image(content: bytes) -> "Iterator[Image.Image]":
    from PIL import Image

    # Pillow's limit is switched off: it would only warn, or refuse images that a spec allows. Our readers check their
    # own limit (data.images.max_megapixels) before they decode anything.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        # Pillow warns about oddities of files that it decodes all the same, such as damaged EXIF data.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            yield image


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "white")
        background.alpha_composite(rgba)
        return background.convert("RGB")
    if image.mode.startswith("I"):
        # Grey values of 16 bits are divided by 256. Pillow's own conversion would make all above 255 white.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGB")
