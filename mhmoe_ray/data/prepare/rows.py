"""Rows of encoders and vision models: chunks of documents become parts, and parts become shards and validation samples.

A row of an encoder has T (`data.seq_len`) tokens, and perhaps an image. A text with an image is one row, cut to T - 1
tokens. Another text becomes as many rows as it needs, each with a start token. An image without text is one row of
padding. A row of a vision model is an annotated image. A part is an Arrow file of rows, training documents first. A
shard has whole parts.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mhmoe_ray.data.images.annotations import unpack
from mhmoe_ray.data.prepare.documents import ShardDocuments
from mhmoe_ray.data.prepare.packing import PackingSettings, ShardResult
from mhmoe_ray.data.prepare.parts import PartSlice, RowCounts, TokenisedPart, part_file
from mhmoe_ray.data.prepare.validation import ValidationSplit, select_rows
from mhmoe_ray.data.shards.columns import ANNOTATION, IMAGE, SECOND_IMAGE, TOKENS, padding_token, token_dtype
from mhmoe_ray.data.shards.documents import write_index
from mhmoe_ray.data.shards.files import (
    SHARD_BYTES,
    file_content,
    join_batches,
    open_batch,
    row_bytes,
    to_batch,
    write_shard,
)
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.data.sources import Document
from mhmoe_ray.data.sources.images import image_hash
from mhmoe_ray.storage import Location

SHARD_PARTS = 10_000
"""Largest number of parts of a shard. All are memory-mapped, and Linux allows 65,530 mappings by default."""


def update_digest(digest: "hashlib._Hash", documents: Sequence[Document], seq_len: int) -> None:
    """Add row length, images and annotations to a part's digest of texts and tokenizer."""
    digest.update(f"rows of {seq_len}".encode())
    if any(document.image_hash for document in documents):
        digest.update(repr([(bool(document.image), document.image_hash or "") for document in documents]).encode())
    if any(document.second_image for document in documents):
        digest.update(f"second images {[image_hash(document.second_image or b'') for document in documents]}".encode())
    if any(document.annotation for document in documents):
        digest.update(f"annotations {[document.annotation or b'' for document in documents]}".encode())


def make_rows(
    documents: Sequence[Document],
    token_ids: Sequence[Sequence[int]],
    held_out: Sequence[bool],
    seq_len: int,
    token_bytes: int,
) -> tuple[memoryview, RowCounts]:
    """Make the rows of a chunk's documents; return the content of their part's file, and the counts.

    `token_ids` has each document's tokens with the start token, or none; `held_out` says which are held out.
    """
    counts, padding = RowCounts(), padding_token(token_bytes)
    train_rows, held_out_rows = list[_Row](), list[_Row]()
    for document, tokens, is_held_out in zip(documents, token_ids, held_out, strict=True):
        image = document.image or b""
        values = image, document.second_image, document.annotation
        rows = [_Row(row, *values) for row in token_rows(tokens, bool(image), seq_len, padding, token_bytes)]
        if is_held_out:
            held_out_rows += rows
            continue
        train_rows += rows
        counts.images += bool(image) * len(rows)
        counts.image_bytes += len(image) + len(document.second_image or b"")
        if document.annotation is not None:
            class_name = unpack(document.annotation).class_name or ""
            counts.class_counts[class_name] = counts.class_counts.get(class_name, 0) + 1
        # Start tokens are not counted: each row of a text has one of its own, but the document has only one.
        targets = sum(int((row.tokens[1:] != padding).sum()) for row in rows)
        counts.targets += targets
        counts.padding += sum(int((row.tokens == padding).sum()) for row in rows)
        counts.cut_tokens += max(0, len(tokens) - 1) - targets
        counts.cut_documents += len(tokens) > seq_len
    counts.samples, counts.held_out_samples = len(train_rows), len(held_out_rows)
    rows = [*train_rows, *held_out_rows]
    if not rows:
        return memoryview(b""), counts
    # All documents of a chunk are of one source, so either all rows have a second image or an annotation, or none has.
    columns = {TOKENS: np.stack([row.tokens for row in rows]), IMAGE: [row.image for row in rows]}
    for name, column in ((SECOND_IMAGE, [r.second_image for r in rows]), (ANNOTATION, [r.annotation for r in rows])):
        if column[0] is not None:
            columns[name] = column
    content = file_content(to_batch(columns))
    counts.file_bytes = len(content)
    return content, counts


class _Row(NamedTuple):
    """Values of a row in the columns of a shard."""

    tokens: np.ndarray
    image: bytes
    second_image: bytes | None
    annotation: bytes | None


def make_annotated_rows(documents: Sequence[Document], held_out: Sequence[bool]) -> tuple[memoryview, RowCounts]:
    """Make the rows of a vision model's chunk, like `make_rows`."""
    rows: dict[bool, list[tuple[bytes, bytes]]] = {False: [], True: []}
    for document, is_held_out in zip(documents, held_out, strict=True):
        assert document.image is not None
        assert document.annotation is not None
        rows[is_held_out].append((document.image, document.annotation))
    images, contents = zip(*rows[False], *rows[True], strict=True)
    annotations = [unpack(content) for content in contents]
    counts = RowCounts(
        samples=len(rows[False]),
        held_out_samples=len(rows[True]),
        images=len(rows[False]),
        image_bytes=sum(len(image) for image, _ in rows[False]),
        class_names=sorted({name for annotation in annotations for name in annotation.class_names}),
        objects_without_mask=sum(i.mask is None for annotation in annotations for i in annotation.instances),
    )
    content = file_content(to_batch({IMAGE: images, ANNOTATION: contents}))
    counts.file_bytes = len(content)
    return content, counts


def row_count(token_count: int, has_image: bool, seq_len: int) -> int:
    """Return the number of rows of a document."""
    return 1 if has_image else -(-max(0, token_count - 1) // (seq_len - 1))


def token_rows(
    tokens: Sequence[int], has_image: bool, seq_len: int, padding: int, token_bytes: int
) -> Iterator[np.ndarray]:
    """Yield the `seq_len` tokens of each row of a document, which may end with padding; with an image, one row."""
    width = seq_len - 1
    for number in range(row_count(len(tokens), has_image, seq_len)):
        row = np.full(seq_len, padding, token_dtype(token_bytes))
        if tokens:
            stretch = tokens[1 + number * width : 1 + (number + 1) * width]
            row[0] = tokens[0]
            row[1 : 1 + len(stretch)] = stretch
        yield row


def map_rows(parts: Location, part_slice: PartSlice) -> pa.RecordBatch:
    """Return the rows of a slice of a part, from its file in the folder of all parts."""
    return open_batch(part_file(parts, part_slice.name, has_rows=True)).slice(part_slice.start, part_slice.length)


class RowPlan(NamedTuple):
    """Plan of one shard of a domain, with the counts of its `ShardResult`."""

    domain: str
    number: int
    slices: list[PartSlice]
    padding: int
    whole_documents: int
    targets: int

    def write(self, settings: PackingSettings) -> ShardResult:
        """Join the rows, and write the shard."""
        batch = join_batches([map_rows(settings.parts, part_slice) for part_slice in self.slices])
        shard = write_shard(settings.folder, f"train/{self.domain}/{self.number:05d}.arrow", batch)
        documents = ShardDocuments.of_slices(settings.parts, self.slices)
        write_index(settings.folder, shard, documents.cut(shard.rows, 1))
        return ShardResult(self.domain, self.number, shard, self.padding, self.whole_documents, self.targets)


def plan_row_shards(domain: str, parts: Sequence[TokenisedPart], row_bytes: int) -> list[RowPlan]:
    """Return the plans of a domain's shards, each of whole parts; `row_bytes` are those of a row's tokens.

    All but the last have at least `SHARD_BYTES` bytes or `SHARD_PARTS` parts.
    """
    plans, group, size = list[RowPlan](), list[tuple[TokenisedPart, RowCounts]](), 0
    for index, part in enumerate(parts):
        counts = part.counts.rows
        if counts is not None and counts.samples:
            group.append((part, counts))
            size += counts.samples * row_bytes + counts.image_bytes
        if group and (size >= SHARD_BYTES or len(group) == SHARD_PARTS or index == len(parts) - 1):
            plans.append(
                RowPlan(
                    domain,
                    len(plans),
                    [member.documents_slice(held_out=False) for member, _ in group],
                    sum(rows.padding for _, rows in group),
                    sum(member.counts.documents - rows.cut_documents for member, rows in group),
                    sum(rows.targets for _, rows in group),
                )
            )
            group, size = [], 0
    return plans


def write_validation_rows(
    settings: PackingSettings, held_out: Mapping[str, Sequence[PartSlice]], max_samples: int
) -> ValidationSplit:
    """Select validation samples among the held-out rows (`select_rows`), and write their shards."""
    selected_rows = select_rows({name: sum(s.length for s in slices) for name, slices in held_out.items()}, max_samples)
    shards, targets = list[Shard](), 0
    batches, size = list[pa.RecordBatch](), 0

    def write() -> None:
        nonlocal batches, size
        shards.append(write_shard(settings.folder, f"validation/{len(shards):05d}.arrow", join_batches(batches)))
        batches, size = [], 0

    for name, slices in held_out.items():
        selected, first_row = selected_rows[name], 0
        for part_slice in slices:
            end_row = first_row + part_slice.length
            indices = selected[(selected >= first_row) & (selected < end_row)] - first_row
            first_row = end_row
            if not len(indices):
                # A part is mapped only if it is read, because Linux limits the mappings of a process.
                continue
            rows = map_rows(settings.parts, part_slice)
            for index in indices.tolist():
                row = rows.slice(index, 1)
                # Rows of other columns are in other shards.
                if batches and row.schema != batches[-1].schema:
                    write()
                batches.append(row)
                targets += _count_targets(row, settings.token_bytes)
                size += row_bytes(row)
                if size >= SHARD_BYTES:
                    write()
    if batches:
        write()
    return ValidationSplit(shards, {name: len(selected_rows[name]) for name in held_out}, targets)


def _count_targets(row: pa.RecordBatch, token_bytes: int) -> int:
    """Return the tokens of a row's text without the start token; 1 for a row of a vision model."""
    if TOKENS not in row.schema.names:
        return 1
    tokens = np.frombuffer(row.column(TOKENS)[0].as_py(), token_dtype(token_bytes))
    return int((tokens[1:] != padding_token(token_bytes)).sum())
