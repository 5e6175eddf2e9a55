"""A fingerprint of what a step read: equal for equal samples in equal order, at any number of workers."""

import hashlib
from collections.abc import Iterable

import numpy as np

DIGEST_BYTES = 6  # exact in a float64, the type in which ranks exchange their numbers


def sample_digest(tokens: np.ndarray) -> int:
    """Of one micro-batch of token ids, (b, T + 1)."""
    data = np.ascontiguousarray(tokens, "<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest(), "little")


def combine_digests(digests: Iterable[int]) -> str:
    """Of the micro-batches of a step, in the step's order."""
    data = b"".join(d.to_bytes(DIGEST_BYTES, "little") for d in digests)
    return hashlib.blake2b(data, digest_size=8).hexdigest()
