"""Which documents are kept for validation."""

import hashlib


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its text, so that copies of it are on the same side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
