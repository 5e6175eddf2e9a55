"""Tokenising of a chunk of documents into a part, a file whose name is a hash of its texts and settings.

A part has tokens, or the rows of an encoder or a vision model (rows.py). An existing part is reused, so a job continues
the work of a killed one even if files were added, moved or changed in between.
"""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from mhmoe_ray.data.chat.encoder import conversation_encoder
from mhmoe_ray.data.chat.template import RenderedConversation
from mhmoe_ray.data.prepare.chunks import DocumentChunk
from mhmoe_ray.data.prepare.parts import (
    PartCounts,
    PartRecord,
    RowCounts,
    TokenisedPart,
    Tokens,
    part_file,
    record_file,
)
from mhmoe_ray.data.prepare.rows import make_annotated_rows, make_rows, row_count, update_digest
from mhmoe_ray.data.prepare.validation import cut_end, is_validation, smallest_fraction
from mhmoe_ray.data.shards.columns import conversation_dtype, token_dtype
from mhmoe_ray.data.sources import Document, Tally
from mhmoe_ray.data.tokenizer import document_encoder
from mhmoe_ray.storage import Location, replace_file

BATCH_CHARACTERS = 1 << 18
"""Largest number of characters encoded in one call, except for a longer text; an encoding takes about 50 times the
memory."""


class TokenisedChunk(NamedTuple):
    """Result of tokenising a chunk of documents into a part."""

    part: TokenisedPart
    tally: Tally
    is_aborted: bool
    """True if the reading of the file was aborted after this chunk."""
    is_reused: bool

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "TokenisedChunk":
        """Return the result in a row of the batch from `tokenise_chunk`."""
        tokenised = pickle.loads(row["tokenised"])
        assert isinstance(tokenised, cls)
        return tokenised


def tokenise_chunk(
    table: pa.Table,
    *,
    tokenizer: Location | None,
    tokenizer_sha256: str | None,
    parts: Location,
    validation_fraction: float,
    token_bytes: int,
    row_tokens: int | None = None,
    is_cut: bool = False,
) -> dict[str, Any]:
    """Tokenise the chunk in a table into a part, or reuse an existing part; return a batch of one `TokenisedChunk`.

    Processes cache the file `tokenizer` (None for a vision model), so it must not change. `row_tokens` is T for an
    encoder, 0 for a vision model, and None for a decoder. If `is_cut`, the end of each document is held out, not some
    documents.
    """
    # Ray runs one such process for each CPU, so the tokenizers library must not start threads for all CPUs in each of
    # them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    chunk = DocumentChunk.from_table(table)
    documents, name, counts, is_reused = chunk.documents, "", PartCounts(), False
    if documents:
        is_chat = documents[0].conversation is not None
        dtype = conversation_dtype(token_bytes) if is_chat else token_dtype(token_bytes)
        if is_cut:
            documents = [
                document._replace(text=text)
                for document in documents
                for text in cut_end(document.text, validation_fraction)
            ]
        name = _part_name(
            documents, tokenizer_sha256, f"{validation_fraction}{' cut' * is_cut}", token_bytes, row_tokens
        )
        path = part_file(parts, name, has_rows=row_tokens is not None)
        existing_counts = _find_counts(path, dtype.itemsize)
        is_reused, counts = existing_counts is not None, existing_counts or counts
        if not is_reused:
            # The record's image decides, or else the text.
            texts = [document.image_hash or document.text for document in documents]
            held_out = [
                i % 2 == 1 if is_cut else is_validation(text, validation_fraction) for i, text in enumerate(texts)
            ]
            if tokenizer is None:
                content, rows = make_annotated_rows(documents, held_out)
                counts = _count_documents(documents, [0] * len(documents), held_out, rows)
                lengths = [1] * len(documents)
            elif row_tokens is None:
                tokens = [*_encode_documents(documents, tokenizer, token_bytes)]
                # Training documents come first and held-out ones last, so that each kind is one slice of the part.
                order = sorted(range(len(documents)), key=held_out.__getitem__)
                content = memoryview(np.concatenate([tokens[number] for number in order]).tobytes())
                lengths = [len(ids) for ids in tokens]
                counts = _count_documents(documents, lengths, held_out)
            else:
                token_ids = _encode_captions(documents, tokenizer)
                content, rows = make_rows(documents, token_ids, held_out, row_tokens, token_bytes)
                counts = _count_documents(documents, map(len, token_ids), held_out, rows)
                lengths = [
                    row_count(len(ids), bool(document.image), row_tokens)
                    for document, ids in zip(documents, token_ids, strict=True)
                ]
            replace_file(path, content)
            counts.smallest_fraction = smallest_fraction(texts)
            # The record is written after the content, so a part with a record is complete.
            replace_file(record_file(path), _record(counts, documents, lengths, held_out).model_dump_json().encode())
    first_line = documents[0].line if documents else 0
    part = TokenisedPart(chunk.file, chunk.number, name, counts, chunk.path, first_line)
    return {"tokenised": [pickle.dumps(TokenisedChunk(part, chunk.tally, chunk.is_aborted, is_reused))]}


def _record(
    counts: PartCounts, documents: Sequence[Document], lengths: Sequence[int], held_out: Sequence[bool]
) -> PartRecord:
    training = [number for number, is_held_out in enumerate(held_out) if not is_held_out]
    return PartRecord(
        **dict(counts),
        lines=[documents[number].line - documents[0].line for number in training],
        line_counts=[documents[number].lines for number in training],
        lengths=[lengths[number] for number in training],
        names=[documents[number].name for number in training] if any(d.name for d in documents) else [],
    )


def _part_name(
    documents: Sequence[Document],
    tokenizer_sha256: str | None,
    split: str,
    token_bytes: int,
    row_tokens: int | None,
) -> str:
    digest = hashlib.sha256(f"{tokenizer_sha256} {split} {token_bytes}".encode())
    for document in documents:
        data = document.text.encode()
        # Each text is preceded by its length, so that the same characters have another hash if they are divided into
        # other texts.
        digest.update(len(data).to_bytes(8))
        digest.update(data)
    # The record of a part has these places. Lines count from the first document's, so a part is reused after a move.
    digest.update(repr([(d.line - documents[0].line, d.lines, d.name) for d in documents]).encode())
    if conversations := [*_conversations(documents)]:
        digest.update(repr([(text, *spans) for text, spans in conversations]).encode())
    if row_tokens is not None:
        update_digest(digest, documents, row_tokens)
    return digest.hexdigest()[:40]


def _conversations(documents: Sequence[Document]) -> Iterator[RenderedConversation]:
    """Yield all conversations of the documents; the rejected one of a pair follows the chosen one."""
    for document in documents:
        yield from (c for c in (document.conversation, document.rejected) if c is not None)


def _find_counts(part: Location, row_bytes: int) -> PartCounts | None:
    """Return an existing part's counts, or None if it is missing, incomplete or damaged."""
    try:
        counts = PartCounts.model_validate_json(record_file(part).read_bytes())
        size = part.stat().st_size
    except FileNotFoundError:
        return None
    # If the file does not have the size that its counts imply, the part is damaged. It then counts as missing, so that
    # it is encoded again.
    expected_size = (counts.tokens + counts.held_out_tokens) * row_bytes
    return counts if size == (counts.rows.file_bytes if counts.rows else expected_size) else None


def _encode_documents(documents: Sequence[Document], tokenizer: Location, token_bytes: int) -> Iterator[Tokens]:
    """Yield each document's tokens; those of a conversation have the fields of `conversation_dtype`."""
    conversations = [*_conversations(documents)]
    rows = (
        conversation.rows(token_bytes)
        for batch in _batches(conversations, lambda conversation: len(conversation.text))
        for conversation in conversation_encoder(tokenizer).encode(batch)
    )
    for document in documents:
        if document.conversation is not None:
            yield next(rows) if document.rejected is None else np.concatenate([next(rows), next(rows)])
    if not conversations:
        for ids in _encode_texts([document.text for document in documents], tokenizer):
            yield np.array(ids, token_dtype(token_bytes))


def _encode_texts(texts: Sequence[str], tokenizer: Location) -> Iterator[Sequence[int]]:
    for batch in _batches(texts, len):
        yield from document_encoder(tokenizer).encode(batch)


def _encode_captions(documents: Sequence[Document], tokenizer: Location) -> list[Sequence[int]]:
    """Return the tokens of each document's text, none for an image without a caption."""
    encoded = _encode_texts([document.text for document in documents if document.text], tokenizer)
    return [next(encoded) if document.text else [] for document in documents]


def _count_documents(
    documents: Sequence[Document], tokens: Iterable[int], held_out: Sequence[bool], rows: RowCounts | None = None
) -> PartCounts:
    counts = PartCounts(rows=rows)
    for document, token_count, is_held_out in zip(documents, tokens, held_out, strict=True):
        counts.text_bytes += len(document.text.encode())
        if is_held_out:
            counts.held_out_documents += 1
            counts.held_out_tokens += token_count
        else:
            counts.documents += 1
            counts.tokens += token_count
    return counts


T = TypeVar("T")


def _batches(documents: Sequence[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    batch, size = list[T](), 0
    for document in documents:
        if batch and size + size_of(document) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += size_of(document)
    if batch:
        yield batch
