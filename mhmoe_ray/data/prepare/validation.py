"""The validation split: which documents are held out, and the samples made of them.

The samples are spread evenly over all held-out text and are cut as in `concat`, whatever the packing of training is.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.prepare.parts import Stream
from mhmoe_ray.data.shards.files import Samples, padding_token, rows_per_shard, token_dtype, write_shard
from mhmoe_ray.data.shards.manifest import Shard


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out, by a hash of its text, so that its copies are on the same side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class Chosen(NamedTuple):
    shards: list[Shard]
    samples: dict[str, int]
    """Number of samples of each domain, in the order of the domains in the shards."""
    targets: int
    """Number of targets that count; the padding of a domain's last sample does not."""


def choose(folder: Path, streams: dict[str, Stream], most: int, seq_len: int, token_bytes: int) -> Chosen:
    """Choose the validation samples and write their shards.

    Args:
        folder: the folder in which the prepared data are being made.
        streams: held-out tokens by domain.
        most: largest number of samples.
        seq_len: T.
        token_bytes: bytes per token, 2 or 4.
    """
    there = [-(-max(0, len(stream) - 1) // seq_len) for stream in streams.values()]
    ends = np.cumsum([0, *there])
    wanted = np.unique(np.linspace(0, ends[-1] - 1, min(most, ends[-1])).round().astype(int))
    rows, counts = [], {}
    for (name, stream), start, end in zip(streams.items(), ends, ends[1:], strict=False):
        own = wanted[(wanted >= start) & (wanted < end)] - start
        counts[name] = len(own)
        rows += [_sample(stream, int(i), seq_len, token_bytes) for i in own]
    samples = np.stack(rows)
    per_shard = rows_per_shard(seq_len, token_bytes)
    shards = [
        write_shard(folder, f"validation/{number:05d}.arrow", samples[first : first + per_shard])
        for number, first in enumerate(range(0, len(samples), per_shard))
    ]
    return Chosen(shards, counts, int((samples[:, 1:] != padding_token(token_bytes)).sum()))


def _sample(stream: Stream, number: int, seq_len: int, token_bytes: int) -> Samples:
    start = number * seq_len
    tokens = stream.part(start, min(len(stream), start + seq_len + 1)).read()
    row: Samples = np.full(seq_len + 1, padding_token(token_bytes), token_dtype(token_bytes))
    row[: len(tokens)] = tokens
    return row
