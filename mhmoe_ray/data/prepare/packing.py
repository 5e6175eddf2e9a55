"""Sequence packing: the plans of shards, each of which packs tokens into one shard.

Documents of a domain fill samples of T + 1 tokens. There are two kinds of sequence packing: concatenation cuts the
documents wherever a sample ends; best fit keeps every document whole that fits into a sample (arXiv 2404.10830). Each
pair of conversations has a sample of its own.
"""

from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.prepare.documents import ShardDocuments
from mhmoe_ray.data.prepare.parts import Tokens, TokenStream
from mhmoe_ray.data.shards.columns import (
    Samples,
    columns_of,
    document_start_mask,
    padding_token,
    single_token,
    target_mask,
)
from mhmoe_ray.data.shards.documents import write_index
from mhmoe_ray.data.shards.files import SHARD_BYTES, rows_per_shard, to_batch, write_shard
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import Location


def cut_concat(tokens: Tokens, samples: int, seq_len: int) -> Samples:
    """Cut a shard's tokens into samples by concatenation, a view (samples, T + 1)."""
    # Neighbouring samples share a token: the last target of one is the first input of the next.
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)
    return windows[: samples * seq_len : seq_len]


def count_whole_documents(tokens: Tokens, samples: int, seq_len: int, start: int) -> int:
    """Return how many documents are whole within one of the samples that concatenation cuts."""
    starts = np.flatnonzero(tokens == start)
    ends = np.append(starts[1:], len(tokens)) - 1
    # The last token of a sample is also the first token of the next sample. A document that begins with this token
    # counts for the next sample.
    sample_index = starts // seq_len
    return int(((sample_index < samples) & (ends <= (sample_index + 1) * seq_len)).sum())


class PackedSamples(NamedTuple):
    """Samples of one shard that were packed by best fit."""

    samples: Samples
    padding: int
    """Number of targets that are padding."""
    whole_documents: int
    """Documents that are whole within one sample."""
    pieces: np.ndarray
    """Sample, offset and document of each piece of a document, (pieces, 3), sorted."""


def plan_best_fit(stream: TokenStream, tokens_per_shard: int) -> list[TokenStream]:
    """Divide a domain's tokens into streams of whole parts, for one shard each.

    All but the last have at least `tokens_per_shard` tokens.
    """
    # A part has the tokens of whole documents, so shards of whole parts do not cut documents.
    shards, start, stop = list[TokenStream](), 0, 0
    for part in stream.parts:
        stop += part.length
        if stop - start >= tokens_per_shard:
            shards.append(stream.substream(start, stop))
            start = stop
    return shards + ([stream.substream(start, stop)] if stop > start else [])


def pack_best_fit(tokens: Tokens, seq_len: int, start: int, padding: int) -> PackedSamples:
    """Pack documents, each of which begins with `start`, into padded samples by best fit.

    A document of at most T tokens is whole in one sample; a longer one is cut.
    """
    starts = np.flatnonzero(document_start_mask(tokens, start))
    targets = np.diff(starts, append=len(tokens))
    pieces, bin_count = _assign_bins(targets, seq_len)
    samples = np.full((bin_count, seq_len + 1), single_token(tokens.dtype, padding), tokens.dtype)
    # The last target of a document is the start token of the next document. One more start token at the end gives the
    # last document such a target too.
    extended_tokens = np.append(tokens, single_token(tokens.dtype, start, starts_document=True))
    for document, offset, bin_index, bin_offset, length in pieces:
        token_index = starts[document] + offset
        if bin_offset == 0:
            samples[bin_index, 0] = extended_tokens[token_index]
        samples[bin_index, 1 + bin_offset : 1 + bin_offset + length] = extended_tokens[
            token_index + 1 : token_index + 1 + length
        ]
    piece_columns = np.array(sorted((p.bin_index, p.bin_offset, p.document) for p in pieces), np.int64).reshape(-1, 3)
    return PackedSamples(
        samples, bin_count * seq_len - int(targets.sum()), int((targets <= seq_len).sum()), piece_columns
    )


def pack_pairs(tokens: Tokens, seq_len: int, start: int, padding: int) -> PackedSamples:
    """Pack each pair, a document of two conversations, into a padded sample of its own.

    A pair of more than T tokens is cut: each conversation keeps at least its first T / 2 tokens, if it has as many.
    """
    start_N = np.flatnonzero(document_start_mask(tokens, start))
    length_N = np.diff(start_N, append=len(tokens))
    length_P2 = length_N.reshape(-1, 2)
    chosen_P = np.minimum(length_P2[:, 0], np.maximum(seq_len // 2, seq_len - length_P2[:, 1]))
    rejected_P = np.minimum(length_P2[:, 1], seq_len - chosen_P)
    sample_N = np.arange(len(length_P2)).repeat(2)
    offset_N = np.stack([np.zeros_like(chosen_P), chosen_P], axis=1).ravel()
    size_N = np.stack([chosen_P, rejected_P], axis=1).ravel()
    samples = np.full((len(length_P2), seq_len + 1), single_token(tokens.dtype, padding), tokens.dtype)
    for sample, offset, token_index, size in zip(sample_N, offset_N, start_N, size_N, strict=True):
        samples[sample, offset : offset + size] = tokens[token_index : token_index + size]
    whole_pairs = int((length_P2.sum(1) <= seq_len).sum())
    pieces = np.stack([sample_N, offset_N, sample_N], axis=1)
    return PackedSamples(samples, len(samples) * seq_len - int(size_N.sum()), whole_pairs, pieces)


class _Piece(NamedTuple):
    """Piece of a document with its place in a bin, which becomes a sample."""

    document: int
    offset: int
    """Offset within the document's targets."""
    bin_index: int
    bin_offset: int
    length: int


def _assign_bins(targets: np.ndarray, seq_len: int) -> tuple[list[_Piece], int]:
    """Assign each document's targets to bins of T targets; return the pieces and the number of bins.

    A document with more than T targets is cut into pieces, each of which begins a new bin. Then each other document,
    longest first, goes into the bin with the least sufficient room, or into a new one.
    """
    pieces, bin_count = list[_Piece](), 0
    bins_by_room: dict[int, list[int]] = {}
    # Bit r is set if there is a bin with room for r more targets, so that the least sufficient room is found in
    # constant time.
    room_bits = 0

    def add_piece(document: int, offset: int, length: int, bin_index: int, bin_offset: int) -> None:
        nonlocal room_bits
        pieces.append(_Piece(document, offset, bin_index, bin_offset, length))
        room = seq_len - bin_offset - length
        bins_by_room.setdefault(room, []).append(bin_index)
        room_bits |= 1 << room

    for document in np.flatnonzero(targets > seq_len):
        for offset in range(0, int(targets[document]), seq_len):
            add_piece(int(document), offset, min(seq_len, int(targets[document]) - offset), bin_count, 0)
            bin_count += 1
    # The sort is stable, so that the packing is the same on every machine.
    short_documents = np.flatnonzero(targets <= seq_len)
    for document in short_documents[np.argsort(-targets[short_documents], kind="stable")]:
        length = int(targets[document])
        fitting_bits = room_bits >> length
        if not fitting_bits:
            add_piece(int(document), 0, length, bin_count, 0)
            bin_count += 1
            continue
        room = length + (fitting_bits & -fitting_bits).bit_length() - 1
        bin_index = bins_by_room[room].pop()
        if not bins_by_room[room]:
            room_bits ^= 1 << room
        add_piece(int(document), 0, length, bin_index, seq_len - room)
    return pieces, bin_count


class ShardResult(NamedTuple):
    """Result of writing one shard."""

    domain: str
    number: int
    """Number of the shard within the domain, from 0."""
    shard: Shard
    padding: int
    """Number of targets that are padding."""
    whole_documents: int
    """Documents that are whole within one sample."""
    targets: int
    """Number of targets that count in the loss."""


class PackingSettings(NamedTuple):
    """Settings of all shards of a preparation."""

    folder: Location
    """Folder of the result."""
    parts: Location
    """Folder of the parts."""
    seq_len: int
    token_bytes: int
    start: int
    """Token that precedes each document; 0 for a vision model."""
    has_pairs: bool = False
    """Whether each document is a pair of conversations."""

    def pack(self, tokens: Tokens) -> PackedSamples:
        """Pack pairs, or other documents by best fit."""
        pack = pack_pairs if self.has_pairs else pack_best_fit
        return pack(tokens, self.seq_len, self.start, padding_token(self.token_bytes))


class ShardPlan(NamedTuple):
    """Plan of one shard of a domain."""

    domain: str
    number: int
    tokens: TokenStream
    samples: int | None
    """Samples to cut with concatenation, after which tokens only show where documents end; None with best fit."""

    def write(self, settings: PackingSettings) -> ShardResult:
        """Pack the tokens, and write the shard."""
        seq_len, padding = settings.seq_len, padding_token(settings.token_bytes)
        tokens = self.tokens.read()
        documents = ShardDocuments.of_slices(settings.parts, self.tokens.parts)
        if self.samples is None:
            packed_samples = settings.pack(tokens)
            samples, padding_count, whole_documents, piece_columns = packed_samples
            pieces = documents.pieces(*piece_columns.T)
        else:
            samples, padding_count = cut_concat(tokens, self.samples, seq_len), 0
            pieces = documents.cut(self.samples, seq_len)
            whole_documents = count_whole_documents(tokens, self.samples, seq_len, settings.start)
        batch = to_batch(columns_of(samples))
        shard = write_shard(settings.folder, f"train/{self.domain}/{self.number:05d}.arrow", batch)
        write_index(settings.folder, shard, pieces)
        targets = int(target_mask(samples, padding)[:, 1:].sum())
        return ShardResult(self.domain, self.number, shard, padding_count, whole_documents, targets)


def plan_concat(domain: str, stream: TokenStream, seq_len: int, rows: int) -> list[ShardPlan]:
    """Divide a domain's tokens into shards of up to `rows` samples, without those after the last full sample."""
    samples, plans = max(0, len(stream) - 1) // seq_len, list[ShardPlan]()
    for first_sample in range(0, samples, rows):
        count = min(rows, samples - first_sample)
        # A shard gets one token more than its samples need. The extra token shows whether a document ends with the last
        # sample. The last shard has all remaining tokens.
        stop = len(stream) if first_sample + count == samples else (first_sample + count) * seq_len + 2
        plans.append(ShardPlan(domain, len(plans), stream.substream(first_sample * seq_len, stop), count))
    return plans


def plan_shards(domain: str, stream: TokenStream, spec: DataSpec, token_bytes: int) -> list[ShardPlan]:
    """Return the plans of a domain's shards, which can be written in any order."""
    if spec.packing == "best_fit":
        streams = plan_best_fit(stream, SHARD_BYTES // token_bytes)
        return [ShardPlan(domain, i, part, None) for i, part in enumerate(streams)]
    return plan_concat(domain, stream, spec.seq_len, rows_per_shard(spec.seq_len, token_bytes))
