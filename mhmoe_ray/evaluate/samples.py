"""Text as samples of a model's length, domain by domain."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.shards.files import Samples
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.data.sources import Document, Reading, find_files
from mhmoe_ray.data.stream import validation_samples
from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec


class DomainSamples(NamedTuple):
    domain: str
    tokens: Samples
    """(samples, T + 1)."""
    counts: np.ndarray
    """(samples, T) bool: the targets that count."""


def held_out(folder: Path) -> Iterator[DomainSamples]:
    """The samples that training validates on.

    Raises:
        DataError: the folder is not prepared.
    """
    manifest = require_data_manifest(folder)
    tokens, counts = validation_samples(folder, manifest)
    start = 0
    for name, domain in manifest.domains.items():
        end = start + domain.validation_samples
        if end > start:
            yield DomainSamples(name, tokens[start:end], counts[start:end])
        start = end


def of_text(data: DataSpec, encoder: DocumentEncoder, seq_len: int, most: int) -> Iterator[DomainSamples]:
    """Raw text, its documents one after another and cut wherever a sample is full.

    Args:
        data: names the text.
        encoder: of the run.
        seq_len: T.
        most: samples of each domain at most, from its beginning.

    Raises:
        DataError: there is no text, or none in a domain that could be read.
    """
    by_domain: dict[str, list[int]] = {}
    wanted = most * seq_len + 1
    for file in find_files(data):
        found = by_domain.setdefault(file.domain, [])
        if len(found) >= wanted:
            continue  # before another file is opened
        for item in Reading(file, data):
            if isinstance(item, Document):
                found += encoder.encode([item.text])[0]
            if len(found) >= wanted:
                break
    for domain, ids in by_domain.items():
        if len(ids) < 2:
            raise DataError(f"text {domain}", "nothing of it can be read", "see `mhmoe data inspect`")
        yield _cut(domain, ids[:wanted], seq_len)


def _cut(domain: str, ids: list[int], seq_len: int) -> DomainSamples:
    """Neighbouring samples share a token: the last target of one is the first input of the next."""
    samples = -(-(len(ids) - 1) // seq_len)
    tokens = np.zeros((samples, seq_len + 1), np.int64)
    counts = np.zeros((samples, seq_len), bool)
    for i in range(samples):
        part = ids[i * seq_len : (i + 1) * seq_len + 1]
        tokens[i, : len(part)] = part
        counts[i, : len(part) - 1] = True
    return DomainSamples(domain, tokens, counts)
