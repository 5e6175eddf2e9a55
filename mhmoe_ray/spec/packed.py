"""Text as an environment variable holds it.

In Linux one has room for 128 KiB: a pattern that the shell spells out is a thousand sources, alike but for a few
letters.
"""

import base64
import zlib


def packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode())).decode()


def unpacked(text: str) -> str:
    """What `packed` was given."""
    return zlib.decompress(base64.b64decode(text)).decode()
