"""Packing the tokens of domains into shards: the plan of each shard, and the task that writes it.

Packing by concatenation puts the documents of a domain one after another and cuts them wherever a sample ends. Packing
by best fit keeps every document whole that fits into a sample (arXiv 2404.10830).
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mhmoe_ray.data.prepare.parts import Stream, Tokens
from mhmoe_ray.data.shards.files import SHARD_BYTES, Samples, padding_token, rows_per_shard, write_shard
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.spec import DataSpec


class Cut(NamedTuple):
    """Stretch of tokens that one shard is made of."""

    stream: Stream
    samples: int
    """Number of samples that the stretch fills; tokens after them only show where documents end."""


def plan_concat(stream: Stream, seq_len: int, rows: int) -> list[Cut]:
    """Plan the shards of a domain with concatenation.

    Args:
        stream: all training tokens of the domain.
        seq_len: T.
        rows: samples per shard.
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
    """Return the first `samples` samples of some tokens, as a view of (samples, T + 1)."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)
    return windows[: samples * seq_len : seq_len]


def whole_documents(tokens: Tokens, samples: int, seq_len: int, start: int) -> int:
    """Return how many documents lie whole within one of the samples of a shard.

    Args:
        tokens: the tokens of the planned cut.
        samples: the number of samples of the planned cut.
        seq_len: T.
        start: the token that each document begins with.
    """
    first = np.flatnonzero(tokens == start)
    last = np.append(first[1:], len(tokens)) - 1
    # A document that begins with the last token of a sample is the next one's.
    sample = first // seq_len
    return int(((sample < samples) & (last <= (sample + 1) * seq_len)).sum())


class Packed(NamedTuple):
    samples: Samples
    padding: int
    cut_documents: int


def plan_best_fit(stream: Stream, tokens_per_shard: int) -> list[Stream]:
    """Plan the shards of a domain with best fit: return the tokens of each shard.

    A shard gets whole parts, so that documents stay whole, until they have at least `tokens_per_shard` tokens.
    """
    shards, start, stop = list[Stream](), 0, 0
    for part in stream.parts:
        stop += part.tokens
        if stop - start >= tokens_per_shard:
            shards.append(stream.part(start, stop))
            start = stop
    return shards + ([stream.part(start, stop)] if stop > start else [])


def pack_best_fit(tokens: Tokens, seq_len: int, start: int, padding: int) -> Packed:
    """Pack documents into samples by best fit; padding fills up the samples.

    Args:
        tokens: the tokens of the documents, each preceded by `start`.
        seq_len: T.
        start: the token that each document begins with.
        padding: the token that marks targets that do not count.
    """
    begins = np.flatnonzero(tokens == start)
    targets = np.diff(begins, append=len(tokens))
    pieces, bins = _place(targets, seq_len)
    samples = np.full((bins, seq_len + 1), padding, tokens.dtype)
    ended = np.append(tokens, tokens.dtype.type(start))  # each document's end, the last one's too
    for document, offset, bin_, place, length in pieces:
        at = begins[document] + offset
        if place == 0:
            samples[bin_, 0] = ended[at]
        samples[bin_, 1 + place : 1 + place + length] = ended[at + 1 : at + 1 + length]
    return Packed(samples, bins * seq_len - int(targets.sum()), int((targets > seq_len).sum()))


class _Piece(NamedTuple):
    document: int
    offset: int
    """Offset of the piece within the document's targets."""
    bin: int
    place: int
    length: int


def _place(targets: np.ndarray, seq_len: int) -> tuple[list[_Piece], int]:
    """Assign the targets of each document to bins; return the pieces and the number of bins.

    A document with more than T targets is cut into pieces of T. Then each other document, longest first, goes into the
    bin with the least room that is enough, or into a new one.
    """
    pieces, bins = list[_Piece](), 0
    free: dict[int, list[int]] = {}  # bins by the room they have
    rooms = 0  # bit r: there is a bin with room r

    def put(document: int, offset: int, length: int, bin_: int, place: int) -> None:
        nonlocal rooms
        pieces.append(_Piece(document, offset, bin_, place, length))
        room = seq_len - place - length
        free.setdefault(room, []).append(bin_)
        rooms |= 1 << room

    for document in np.flatnonzero(targets > seq_len):
        for offset in range(0, int(targets[document]), seq_len):
            put(int(document), offset, min(seq_len, int(targets[document]) - offset), bins, 0)
            bins += 1
    short = np.flatnonzero(targets <= seq_len)
    for document in short[np.argsort(-targets[short], kind="stable")]:
        length = int(targets[document])
        enough = rooms >> length
        if not enough:
            put(int(document), 0, length, bins, 0)
            bins += 1
            continue
        room = length + (enough & -enough).bit_length() - 1
        bin_ = free[room].pop()
        if not free[room]:
            rooms ^= 1 << room
        put(int(document), 0, length, bin_, seq_len - room)
    return pieces, bins


class ShardPlan(NamedTuple):
    """Plan of one shard."""

    domain: str
    number: int
    tokens: Stream
    samples: int | None
    """Number of samples that concatenation cuts; None with best fit, which determines it when packing."""


class Made(NamedTuple):
    domain: str
    number: int
    shard: Shard
    padding: int
    whole_documents: int


def plan_shards(domain: str, stream: Stream, spec: DataSpec, token_bytes: int) -> list[ShardPlan]:
    """Return the plans of a domain's shards.

    What they hold depends on the domain's tokens alone, so they can be made in any order.
    """
    if spec.packing == "best_fit":
        streams = plan_best_fit(stream, SHARD_BYTES // token_bytes)
        return [ShardPlan(domain, i, part, None) for i, part in enumerate(streams)]
    cuts = plan_concat(stream, spec.seq_len, rows_per_shard(spec.seq_len, token_bytes))
    return [ShardPlan(domain, i, cut.stream, cut.samples) for i, cut in enumerate(cuts)]


def make_shard(row: dict[str, Any], *, folder: Path, seq_len: int, token_bytes: int, start: int) -> dict[str, Any]:
    """Write one shard: a task of Ray Data that takes a pickled `ShardPlan` and returns a pickled `Made`.

    Args:
        row: a row whose `plan` is the pickled plan.
        folder: the folder in which the prepared data are being made.
        seq_len: T.
        token_bytes: bytes per token, 2 or 4.
        start: the token that each document begins with.
    """
    asked: ShardPlan = pickle.loads(row["plan"])
    tokens = asked.tokens.read()
    if asked.samples is None:
        samples, padding, cut = pack_best_fit(tokens, seq_len, start, padding_token(token_bytes))
        whole = int((tokens == start).sum()) - cut
    else:
        samples, padding = cut_concat(tokens, asked.samples, seq_len), 0
        whole = whole_documents(tokens, asked.samples, seq_len, start)
    shard = write_shard(folder, f"train/{asked.domain}/{asked.number:05d}.arrow", samples)
    return {"made": pickle.dumps(Made(asked.domain, asked.number, shard, padding, whole))}
