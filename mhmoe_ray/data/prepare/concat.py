"""Packing by concatenation: the documents of a domain one after another, cut wherever a sample ends.

Sample i is tokens i T .. (i + 1) T of the stream, both included: neighbours share one token, the last target of one and
first input of the next, so that each token but the first is a target exactly once. The unfilled rest is counted.
"""

from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.prepare.parts import Stream, Tokens
from mhmoe_ray.data.shards.files import Samples


class Cut(NamedTuple):
    """Tokens that one shard is made of."""

    stream: Stream
    samples: int
    """How many fill it; after them come tokens that only tell where documents end."""


def plan_concat(stream: Stream, seq_len: int, rows: int) -> list[Cut]:
    """The shards of a domain.

    Args:
        stream: all its training tokens.
        seq_len: T.
        rows: samples of a shard.
    """
    samples = max(0, len(stream) - 1) // seq_len
    cuts = []
    for first in range(0, samples, rows):
        count = min(rows, samples - first)
        # One more, to see whether a document ends with the last sample; the last shard sees to the end.
        stop = len(stream) if first + count == samples else (first + count) * seq_len + 2
        cuts.append(Cut(stream.part(first * seq_len, stop), count))
    return cuts


def cut_concat(tokens: Tokens, samples: int, seq_len: int) -> Samples:
    """The first `samples` samples of some tokens, a view."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)
    return windows[: samples * seq_len : seq_len]


def whole_documents(tokens: Tokens, samples: int, seq_len: int, start: int) -> int:
    """How many documents lie whole within one of these samples.

    Args:
        tokens: as planned.
        samples: as planned.
        seq_len: T.
        start: the token that each document begins with.
    """
    first = np.flatnonzero(tokens == start)
    last = np.append(first[1:], len(tokens)) - 1
    # A document that begins with the last token of a sample is the next one's.
    sample = first // seq_len
    return int(((sample < samples) & (last <= (sample + 1) * seq_len)).sum())
