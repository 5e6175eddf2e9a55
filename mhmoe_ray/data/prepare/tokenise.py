"""Tokenising of a chunk of documents into a part, a file whose name is a hash of its texts and settings.

A part has tokens, or the rows of an encoder or a vision model (rows.py). An existing part is reused, so a job continues
the work of a killed one even if files were added, moved or changed in between.
"""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from mhmoe_ray.data.chat.encoder import conversation_encoder
from mhmoe_ray.data.prepare.chunks import Chunk
from mhmoe_ray.data.prepare.parts import Tokens, part_file
from mhmoe_ray.data.prepare.rows import (
    RowCounts,
    is_held_out,
    make_annotated_rows,
    make_rows,
    rows_file,
    update_digest,
)
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.shards.columns import conversation_dtype, token_dtype
from mhmoe_ray.data.sources import Tally
from mhmoe_ray.data.tokenizer import document_encoder
from mhmoe_ray.storage import replace_file

BATCH_CHARACTERS = 1 << 18
"""Largest number of characters encoded in one call, except for a longer text; an encoding takes about 50 times the
memory."""


class PartCounts(BaseModel):
    """Counts of a part, which has the training documents first, then the held-out ones."""

    documents: int = 0
    """Number of training documents."""
    tokens: int = 0
    """Tokens of the training documents, with their start tokens."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the texts of all documents."""
    rows: RowCounts | None = None
    """None for a decoder."""


class Part(NamedTuple):
    """Record of a part, which the driver keeps until all shards are packed."""

    file: int
    chunk: int
    name: str
    """Empty for a chunk without documents."""
    counts: PartCounts


class TokenisedChunk(NamedTuple):
    """Result of tokenising a chunk of documents into a part."""

    part: Part
    tally: Tally
    is_aborted: bool
    """True if the reading of the file was aborted after this chunk."""
    is_reused: bool

    def as_row(self) -> dict[str, Any]:
        """Return the result as a row of a Ray dataset."""
        return {"tokenised": pickle.dumps(self)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "TokenisedChunk":
        """Return the result in a row from `as_row`."""
        tokenised = pickle.loads(row["tokenised"])
        assert isinstance(tokenised, cls)
        return tokenised


def tokenise_chunk(
    table: pa.Table,
    *,
    tokenizer: Path | None,
    tokenizer_sha256: str | None,
    parts: Path,
    validation_fraction: float,
    token_bytes: int,
    row_tokens: int | None = None,
) -> dict[str, Any]:
    """Tokenise the chunk in a table into a part, or reuse an existing part; return a batch of one `TokenisedChunk`.

    Processes cache the file `tokenizer` (None for a vision model), so it must not change. `row_tokens` is T for an
    encoder, 0 for a vision model, and None for a decoder.
    """
    # Ray runs one such process for each CPU, so the tokenizers library must not start threads for all CPUs in each of
    # them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    chunk = Chunk.from_table(table)
    name, counts, is_reused = "", PartCounts(), False
    if chunk.texts:
        dtype = token_dtype(token_bytes) if chunk.conversations is None else conversation_dtype(token_bytes)
        name = _part_name(chunk, tokenizer_sha256, validation_fraction, token_bytes, row_tokens)
        path = part_file(parts, name) if row_tokens is None else rows_file(parts, name)
        existing_counts = _find_counts(path, dtype.itemsize)
        is_reused, counts = existing_counts is not None, existing_counts or counts
        if not is_reused:
            if tokenizer is None:
                content, row_counts = make_annotated_rows(chunk, validation_fraction)
                counts = PartCounts(
                    documents=row_counts.samples, held_out_documents=row_counts.held_out_samples, rows=row_counts
                )
            elif row_tokens is None:
                documents = _encode_documents(chunk, tokenizer, token_bytes)
                tokens, counts = _split_documents(chunk.texts, documents, validation_fraction, dtype)
                content = memoryview(tokens.tobytes())
            else:
                content, counts = _encode_rows(chunk, tokenizer, validation_fraction, row_tokens, token_bytes)
            replace_file(path, content)
            # The counts are written after the content, so a part with counts is complete.
            replace_file(_counts_file(path), counts.model_dump_json().encode())
    tokenised = TokenisedChunk(Part(chunk.file, chunk.number, name, counts), chunk.tally, chunk.is_aborted, is_reused)
    return {key: [value] for key, value in tokenised.as_row().items()}


def _part_name(
    chunk: Chunk, tokenizer_sha256: str | None, validation_fraction: float, token_bytes: int, row_tokens: int | None
) -> str:
    digest = hashlib.sha256(f"{tokenizer_sha256} {validation_fraction} {token_bytes}".encode())
    for text in chunk.texts:
        data = text.encode()
        # Each text is preceded by its length, so that the same characters have another hash if they are divided into
        # other texts.
        digest.update(len(data).to_bytes(8))
        digest.update(data)
    if chunk.conversations is not None:
        digest.update(repr([(text, *spans) for text, spans in chunk.conversations]).encode())
    if row_tokens is not None:
        update_digest(digest, chunk, row_tokens)
    return digest.hexdigest()[:40]


def _counts_file(part: Path) -> Path:
    return part.with_suffix(".json")


def _find_counts(part: Path, row_bytes: int) -> PartCounts | None:
    """Return an existing part's counts, or None if it is missing, incomplete or damaged."""
    try:
        counts = PartCounts.model_validate_json(_counts_file(part).read_bytes())
        size = part.stat().st_size
    except FileNotFoundError:
        return None
    # If the file does not have the size that its counts imply, the part is damaged. It then counts as missing, so that
    # it is encoded again.
    expected_size = (counts.tokens + counts.held_out_tokens) * row_bytes
    return counts if size == (counts.rows.file_bytes if counts.rows else expected_size) else None


def _encode_documents(chunk: Chunk, tokenizer: Path, token_bytes: int) -> Iterator[Tokens]:
    """Yield each document's tokens; those of a conversation have the fields of `conversation_dtype`."""
    if chunk.conversations is None:
        for batch in _batches(chunk.texts, len):
            for ids in document_encoder(tokenizer).encode(batch):
                yield np.array(ids, token_dtype(token_bytes))
        return
    for conversations in _batches(chunk.conversations, lambda conversation: len(conversation.text)):
        for conversation in conversation_encoder(tokenizer).encode(conversations):
            yield conversation.rows(token_bytes)


def _split_documents(
    texts: Sequence[str], documents: Iterable[Tokens], validation_fraction: float, dtype: np.dtype[Any]
) -> tuple[Tokens, PartCounts]:
    counts, train, held_out = PartCounts(), list[Tokens](), [np.empty(0, dtype)]
    for text, tokens in zip(texts, documents, strict=True):
        counts.text_bytes += len(text.encode())
        if is_validation(text, validation_fraction):
            held_out.append(tokens)
            counts.held_out_documents += 1
            counts.held_out_tokens += len(tokens)
        else:
            train.append(tokens)
            counts.documents += 1
            counts.tokens += len(tokens)
    # Training documents come first and held-out ones last, so that each kind is one slice of the part.
    return np.concatenate([*train, *held_out]), counts


def _encode_rows(
    chunk: Chunk, tokenizer: Path, validation_fraction: float, seq_len: int, token_bytes: int
) -> tuple[memoryview, PartCounts]:
    texts = [text for text in chunk.texts if text]
    encoded = (
        ids for batch in (_batches(texts, len) if texts else ()) for ids in document_encoder(tokenizer).encode(batch)
    )
    documents = [next(encoded) if text else [] for text in chunk.texts]
    content, row_counts = make_rows(chunk, documents, validation_fraction, seq_len, token_bytes)
    counts = PartCounts(rows=row_counts, text_bytes=sum(len(text.encode()) for text in texts))
    for number, ids in enumerate(documents):
        if is_held_out(chunk, number, validation_fraction):
            counts.held_out_documents += 1
            counts.held_out_tokens += len(ids)
        else:
            counts.documents += 1
            counts.tokens += len(ids)
    return content, counts


T = TypeVar("T")


def _batches(documents: Sequence[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    batch, size = list[T](), 0
    for document in documents:
        if batch and size + size_of(document) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += size_of(document)
    yield batch
