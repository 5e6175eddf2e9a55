"""Tokenising of a chunk of documents: its tokens become a part, a file whose name is a hash of its texts and settings.

A part that exists is reused. So a job that follows a killed one continues its work, even if files were added, moved or
changed in between.
"""

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from mhmoe_ray.data.prepare.chunks import Chunk
from mhmoe_ray.data.prepare.parts import Tokens, part_file
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.shards.files import token_dtype
from mhmoe_ray.data.sources import Tally
from mhmoe_ray.data.tokenizer import DocumentEncoder, document_encoder
from mhmoe_ray.storage import replace_file

BATCH_CHARACTERS = 1 << 18
"""Largest number of characters that are encoded in one call (a longer text is encoded alone); an encoding takes about
50 times the memory of its text."""


class PartCounts(BaseModel):
    """Counts of a part, which holds the tokens of its training documents, then those of its held-out documents."""

    documents: int = 0
    """Number of training documents."""
    tokens: int = 0
    """Number of tokens of the training documents, including a start token for each."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the texts of all these documents."""


class Part(NamedTuple):
    """Record of the part of a chunk, which the driver keeps until all shards are packed."""

    file: int
    chunk: int
    name: str
    """Name of the part; empty for a chunk without documents."""
    counts: PartCounts


class TokenisedChunk(NamedTuple):
    """Result of tokenising a chunk into a part."""

    part: Part
    tally: Tally
    is_aborted: bool
    """True if the reading of the file was aborted after this chunk, as in `Chunk`."""
    is_reused: bool
    """True if the part already existed."""

    def as_row(self) -> dict[str, Any]:
        """Return the result as a row of a Ray dataset."""
        return {"tokenised": pickle.dumps(self)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "TokenisedChunk":
        """Return the result in a row that `as_row` made."""
        tokenised = pickle.loads(row["tokenised"])
        assert isinstance(tokenised, cls)
        return tokenised


def tokenise_chunk(
    table: pa.Table,
    *,
    tokenizer: Path,
    tokenizer_sha256: str,
    parts: Path,
    validation_fraction: float,
    token_bytes: int,
) -> dict[str, Any]:
    """Tokenise a chunk into a part, or reuse the part if it exists: a task of Ray Data.

    It maps a table of one `Chunk` to a batch of one `TokenisedChunk`.

    Args:
        table: a table that `read_chunks` yielded.
        tokenizer: the path of a tokenizer.json, which never changes.
        tokenizer_sha256: SHA-256 of that file.
        parts: the folder of the parts.
        validation_fraction: share of the documents that is held out.
        token_bytes: bytes per token, 2 or 4.
    """
    # Ray runs one such process for each CPU, so the library must not start threads for all CPUs in each of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    chunk = Chunk.from_table(table)
    name, counts, is_reused = "", PartCounts(), False
    if chunk.texts:
        name = _part_name(chunk.texts, tokenizer_sha256, validation_fraction, token_bytes)
        existing_counts = _find_counts(part_file(parts, name), token_bytes)
        is_reused, counts = existing_counts is not None, existing_counts or counts
        if not is_reused:
            tokens, counts = _encode_texts(chunk.texts, document_encoder(tokenizer), validation_fraction, token_bytes)
            replace_file(part_file(parts, name), tokens.tobytes())
            # The counts are written after the tokens, so a part with counts has all of its tokens.
            replace_file(_counts_file(part_file(parts, name)), counts.model_dump_json().encode())
    tokenised = TokenisedChunk(Part(chunk.file, chunk.number, name, counts), chunk.tally, chunk.is_aborted, is_reused)
    return {key: [value] for key, value in tokenised.as_row().items()}


def _part_name(texts: Iterable[str], tokenizer_sha256: str, validation_fraction: float, token_bytes: int) -> str:
    """Return the name of a part: a hash of everything that determines its content."""
    digest = hashlib.sha256(f"{tokenizer_sha256} {validation_fraction} {token_bytes}".encode())
    for text in texts:
        data = text.encode()
        # Each text is preceded by its length, so that the same characters have another hash if they are divided into
        # other texts.
        digest.update(len(data).to_bytes(8))
        digest.update(data)
    return digest.hexdigest()[:40]


def _counts_file(part: Path) -> Path:
    return part.with_suffix(".json")


def _find_counts(part: Path, token_bytes: int) -> PartCounts | None:
    """Return the counts of an existing part, or None if the part is missing, incomplete or of another size."""
    try:
        counts = PartCounts.model_validate_json(_counts_file(part).read_bytes())
        size = part.stat().st_size
    except FileNotFoundError:
        return None
    # A part of another size is damaged. It counts as missing, so that it is encoded again.
    return counts if size == (counts.tokens + counts.held_out_tokens) * token_bytes else None


def _encode_texts(
    texts: list[str], encoder: DocumentEncoder, validation_fraction: float, token_bytes: int
) -> tuple[Tokens, PartCounts]:
    """Return the tokens and counts of a part: the training documents, then the held-out ones."""
    counts, dtype = PartCounts(), token_dtype(token_bytes)
    train, held_out = list[Tokens](), [np.empty(0, dtype)]
    for batch in _batches(texts):
        for text, ids in zip(batch, encoder.encode(batch), strict=True):
            tokens = np.array(ids, dtype)
            counts.text_bytes += len(text.encode())
            if is_validation(text, validation_fraction):
                held_out.append(tokens)
                counts.held_out_documents += 1
                counts.held_out_tokens += len(tokens)
            else:
                train.append(tokens)
                counts.documents += 1
                counts.tokens += len(tokens)
    # Training documents come first, so that each kind is one slice of the part.
    return np.concatenate([*train, *held_out]), counts


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in batches of at most `BATCH_CHARACTERS` characters; a longer text is a batch of its own."""
    batch, size = list[str](), 0
    for text in texts:
        if batch and size + len(text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield batch
