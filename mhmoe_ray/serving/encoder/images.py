"""Images of requests: data URLs, checked and decoded. Other URLs are refused, and nothing is ever fetched."""

import base64
import binascii
import re

import numpy as np

from mhmoe_ray.data.crops import crop_pixels
from mhmoe_ray.data.images import DamagedImageError, NotImageError, TooManyPixelsError, check_image_file

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
MAX_MEGAPIXELS = 20.0
"""Largest number of pixels of an image in a request, in millions; a larger one is refused before it is decoded."""


class RefusedImageError(Exception):
    """Error of an image that cannot be used; its text says why, for the client."""


def is_image_url(text: str) -> bool:
    """Return whether a text is a data URL of an image."""
    return _DATA_URL.match(text) is not None


def read_image(url: str, size: int) -> np.ndarray:
    """Return the image in a data URL as the model reads it, uint8 (size, size, 3).

    The image is cropped to the largest square at its centre.

    Args:
        url: the data URL, with base64.
        size: height and width of the result in pixels.

    Raises:
        RefusedImageError: it is no data URL of an image, the image is too large, or it cannot be decoded.
    """
    prefix = _DATA_URL.match(url)
    if prefix is None:
        raise RefusedImageError("an image must be a data URL, data:image/png;base64,...; other URLs are not fetched")
    try:
        content = base64.b64decode(url[prefix.end() :], validate=True)
    except (binascii.Error, ValueError) as e:
        raise RefusedImageError(f"the data URL is not base64: {e}") from e
    try:
        image = check_image_file(content, round(MAX_MEGAPIXELS * 1e6))
    except NotImageError as e:
        raise RefusedImageError("the data URL has no image of a known format") from e
    except TooManyPixelsError as e:
        raise RefusedImageError(f"the image has {e} pixels, more than {MAX_MEGAPIXELS:.0f} million") from e
    except DamagedImageError as e:
        raise RefusedImageError(f"the image cannot be decoded: {e}") from e
    return crop_pixels(image, size)
