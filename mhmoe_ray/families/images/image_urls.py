"""Check and decode the images of requests: data URLs, base64 or bytes. Other URLs are refused and never fetched."""

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from mhmoe_ray.data.images.files import (
    DamagedImageError,
    ImageLimitError,
    NotImageError,
    TooManyPixelsError,
    check_image_file,
)

if TYPE_CHECKING:
    from PIL import Image

P = ParamSpec("P")
T = TypeVar("T")

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9.+-]*:", re.IGNORECASE)
MAX_MEGAPIXELS = 20.0
"""Largest number of pixels of an image in a request, in millions; a larger one is refused before it is decoded."""


class RefusedImageError(Exception):
    """Error for an image of a request that cannot be used; its message tells the client the reason."""


class ImageThread:
    """Thread that works on images, one at a time, while the event loop goes on with other requests.

    A large image takes hundreds of megabytes, so one at a time bounds the memory. Besides, Pillow's warnings are
    silenced by a context that is not safe with several threads.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="images")

    async def run(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call a function in the thread, but never after the request is cancelled while it waits for the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **options))


def is_image_url(text: str) -> bool:
    """Return whether a text is a data URL of an image."""
    return _DATA_URL.match(text) is not None


def read_image_url(url: str) -> "Image.Image":
    """Return the image in a data URL as RGB; another text or an unusable image is a RefusedImageError."""
    prefix = _DATA_URL.match(url)
    if prefix is None:
        raise RefusedImageError("an image must be a data URL, data:image/png;base64,...; other URLs are not fetched")
    return read_image_file(_decode_base64(url[prefix.end() :], "the data URL"))


def read_image_text(text: str) -> "Image.Image":
    """Return the image in a data URL or in base64 as RGB; another text or an unusable image is a RefusedImageError."""
    # Base64 has no colons, and every URL has one.
    return read_image_url(text) if _URL.match(text) else read_image_file(_decode_base64(text, "the text"))


def read_image_file(content: bytes) -> "Image.Image":
    """Return the image in an image file as RGB; one too large or impossible to decode is a RefusedImageError."""
    try:
        return check_image_file(content, round(MAX_MEGAPIXELS * 1e6))
    except NotImageError as e:
        reason = "it has no image of a known format: PNG, JPEG, WebP, BMP, GIF or TIFF"
        raise RefusedImageError(reason if content else "it is empty") from e
    except TooManyPixelsError as e:
        raise RefusedImageError(f"the image has {e} pixels, more than {MAX_MEGAPIXELS:.0f} million") from e
    except ImageLimitError as e:
        raise RefusedImageError(f"the image cannot be used: {e}") from e
    except DamagedImageError as e:
        raise RefusedImageError(f"the image cannot be decoded: {e}") from e


def _decode_base64(text: str, subject: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise RefusedImageError(f"{subject} is not base64: {e}") from e
