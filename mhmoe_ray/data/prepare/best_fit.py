"""Packing by best fit: a document that fits into a sample stays whole (arXiv 2404.10830).

A document of n tokens has n + 1 targets: its tokens, and the start token that says it is over. A sample has one first
token and T places for targets, in which documents follow one another; what is left is padding.

    first token      targets
    S                a b c S d e S - - -       two documents and three places of padding
    S                a b c d e f g h i j       a document of more than T targets: its whole samples,
    j                k l S d e f S - - -       then its rest, which begins a sample after its last token

Documents are placed from the longest to the shortest, each into the fullest sample that has room.
"""

from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.prepare.parts import Stream, Tokens
from mhmoe_ray.data.shards.files import Samples


class Packed(NamedTuple):
    samples: Samples
    padding: int
    cut_documents: int


def plan_best_fit(stream: Stream, tokens_per_shard: int) -> list[Stream]:
    """What each shard of a domain is made of: whole parts, so that documents are whole, until there are enough."""
    shards, start, stop = list[Stream](), 0, 0
    for part in stream.parts:
        stop += part.tokens
        if stop - start >= tokens_per_shard:
            shards.append(stream.part(start, stop))
            start = stop
    return shards + ([stream.part(start, stop)] if stop > start else [])


def pack_best_fit(tokens: Tokens, seq_len: int, start: int, padding: int) -> Packed:
    """Samples of some documents.

    Args:
        tokens: of documents, each preceded by `start`.
        seq_len: T.
        start: the token that each document begins with.
        padding: marks targets that do not count.
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
    """Of its targets."""
    bin: int
    place: int
    length: int


def _place(targets: np.ndarray, seq_len: int) -> tuple[list[_Piece], int]:
    """Where each document's targets go, and the number of bins."""
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
