"""Token streams cut into samples of T + 1 tokens.

A stream is the documents of a domain one after another, each preceded by the tokenizer's start token.
Cuts fall anywhere.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.shards.files import ShardWriter, padding_token, token_dtype
from mhmoe_ray.data.shards.manifest import Shard

CHUNK = 1 << 24  # tokens in memory at a time


class Packed(NamedTuple):
    shards: list[Shard]
    samples: int
    tokens: int
    unused_tokens: int


def pack(streams: Iterable[Path], writer: ShardWriter, seq_len: int, token_bytes: int) -> Packed:
    """Cut the concatenation of raw token files into samples; the unfilled rest is counted, not padded."""
    rest = np.empty(0, token_dtype(token_bytes))
    samples = tokens = 0
    for path in streams:
        if path.stat().st_size == 0:
            continue
        stream = np.memmap(path, token_dtype(token_bytes), mode="r")
        for start in range(0, len(stream), CHUNK):
            chunk = stream[start : start + CHUNK]
            tokens += len(chunk)
            cut, rest = _cut(np.concatenate([rest, chunk]), seq_len)
            samples += len(cut)
            writer.write(cut)
    return Packed(writer.close(), samples, tokens, max(0, len(rest) - 1))


def pack_validation(streams: Iterable[Path], seq_len: int, token_bytes: int) -> np.ndarray:
    """All of the streams as samples; the last one is filled up with padding, so that no held-out token is lost."""
    dtype = token_dtype(token_bytes)
    stream = np.concatenate([np.fromfile(path, dtype) for path in streams] or [np.empty(0, dtype)])
    if len(stream) < 2:
        return np.empty((0, seq_len + 1), dtype)
    missing = -(len(stream) - 1) % seq_len
    return _cut(np.concatenate([stream, np.full(missing, padding_token(token_bytes), dtype)]), seq_len)[0]


def _cut(stream: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole samples and the rest; neighbours share one token, the last target of one and first input of the next."""
    count = max(0, (len(stream) - 1) // seq_len)
    index = np.arange(count)[:, None] * seq_len + np.arange(seq_len + 1)
    return stream[index], stream[count * seq_len :]
