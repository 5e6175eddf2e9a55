"""The validation split: the selection of held-out documents, and their samples.

Samples of texts are spread evenly over all held-out text, and cut as by concatenation even if training samples are
packed by best fit; conversations are packed by best fit. Samples of encoders and vision models are divided among the
sources, whose different kinds have losses of their own.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.prepare.packing import PackingSettings
from mhmoe_ray.data.prepare.parts import PartCounts, Tokens, TokenStream
from mhmoe_ray.data.shards.columns import columns_of, padding_token, target_mask, token_dtype, with_all_columns
from mhmoe_ray.data.shards.files import rows_per_shard, to_batch, write_shard
from mhmoe_ray.data.shards.manifest import Shard


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a hash of a document's text, or of its image, selects it for a held-out share of `fraction`."""
    return _text_hash(text) < fraction * 2**64


def smallest_fraction(texts: Sequence[str]) -> float:
    """Return the smallest held-out share that holds out one of these texts or images."""
    return math.nextafter(min(map(_text_hash, texts)) / 2**64, 1)


def _text_hash(text: str) -> int:
    # Copies of a text have the same hash, so either all or none are held out, and no copy of a validation text is
    # trained on.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def cut_end(text: str, fraction: float) -> list[str]:
    """Return a text without its end, and its end: about `fraction` of its characters, in whole lines if it has some."""
    position = len(text) - math.ceil(fraction * len(text))
    position = text.rfind("\n", 0, position) + 1 or position
    return [text[:position], text[position:]]


def split_of_few_documents(counts: Sequence[PartCounts], fraction: float, *, can_cut: bool) -> tuple[float, bool]:
    """Return the share of documents to hold out, at least one of them, and whether to cut each document instead.

    `counts` are those with the share `fraction`. Where `can_cut`, the end of a sole document is held out.
    """
    held_out_documents = sum(count.held_out_documents for count in counts)
    if can_cut and sum(count.documents for count in counts) + held_out_documents == 1:
        return fraction, True
    smallest = min((count.smallest_fraction for count in counts if count.documents), default=fraction)
    return (fraction if held_out_documents else max(fraction, smallest)), False


class ValidationSplit(NamedTuple):
    """Shards and counts of the validation samples that were written."""

    shards: list[Shard]
    sample_counts: dict[str, int]
    """Number of samples of each domain, in the order of the shards."""
    target_count: int
    """Targets that count in the validation loss; for a vision model, samples."""


def write_validation_split(
    settings: PackingSettings, streams: Mapping[str, TokenStream], max_samples: int
) -> ValidationSplit:
    """Select validation samples, spread evenly over all held-out tokens, and write their shards.

    Padding may fill up a domain's last sample. Domains share shards, so all samples get the columns of conversations if
    any domain has some.
    """
    folder, _, seq_len, token_bytes, start_token, _ = settings
    padding = padding_token(token_bytes)
    # Conversations are packed whole, because the beginning of a sample would otherwise have answers without questions.
    packed_samples = {
        name: settings.pack(stream.read()).samples for name, stream in streams.items() if stream.dtype.names is not None
    }
    # Padding may fill up the last sample of a domain, so the division rounds up.
    available = [
        len(packed_samples[name]) if name in packed_samples else -(-max(0, len(stream) - 1) // seq_len)
        for name, stream in streams.items()
    ]
    rows, counts = list[Tokens](), {}
    for (name, stream), domain_samples in zip(streams.items(), select_samples(available, max_samples), strict=True):
        counts[name] = len(domain_samples)
        if name in packed_samples:
            rows += [*packed_samples[name][domain_samples]]
        else:
            text_rows = (_read_sample(stream, int(i), seq_len, token_bytes) for i in domain_samples)
            rows += [with_all_columns(row, start_token, padding) if packed_samples else row for row in text_rows]
    samples = np.stack(rows)
    per_shard = rows_per_shard(seq_len, token_bytes)
    shards = [
        write_shard(
            folder,
            f"validation/{number:05d}.arrow",
            to_batch(columns_of(samples[first_row : first_row + per_shard])),
        )
        for number, first_row in enumerate(range(0, len(samples), per_shard))
    ]
    return ValidationSplit(shards, counts, int(target_mask(samples, padding)[:, 1:].sum()))


def select_samples(available: Sequence[int], max_samples: int) -> list[np.ndarray]:
    """Select validation samples evenly among all domains; return their numbers by domain."""
    ends = np.cumsum([0, *available])
    selected = np.unique(np.linspace(0, ends[-1] - 1, min(max_samples, ends[-1])).round().astype(int))
    return [selected[(selected >= start) & (selected < end)] - start for start, end in pairwise(ends)]


def select_rows(available: Mapping[str, int], max_samples: int) -> dict[str, np.ndarray]:
    """Select validation rows evenly among the held-out rows of each domain; return their numbers by domain.

    Each source gets an equal share and divides it equally among its domains; others get what one cannot fill.
    """
    domains_by_source: dict[str, list[str]] = {}
    for name in available:
        domains_by_source.setdefault(source_of(name), []).append(name)
    source_rows = [sum(available[name] for name in names) for names in domains_by_source.values()]
    counts = dict[str, int]()
    for names, share in zip(domains_by_source.values(), _equal_shares(source_rows, max_samples), strict=True):
        counts |= zip(names, _equal_shares([available[name] for name in names], share), strict=True)
    return {
        name: np.unique(np.linspace(0, available[name] - 1, counts[name]).round().astype(int)) for name in available
    }


def _equal_shares(available: Sequence[int], total: int) -> list[int]:
    """Divide `total` as equally as possible into shares within `available`."""
    shares = [0] * len(available)
    # The smallest entries of `available` come first, because the larger ones share the samples that smaller ones cannot
    # provide.
    for share_count, index in enumerate(sorted(range(len(available)), key=lambda index: available[index])):
        shares[index] = min(available[index], -(-(total - sum(shares)) // (len(available) - share_count)))
    return shares


def _read_sample(stream: TokenStream, number: int, seq_len: int, token_bytes: int) -> Tokens:
    start = number * seq_len
    tokens = stream.substream(start, min(len(stream), start + seq_len + 1)).read()
    row: Tokens = np.full(seq_len + 1, padding_token(token_bytes), token_dtype(token_bytes))
    row[: len(tokens)] = tokens
    return row
