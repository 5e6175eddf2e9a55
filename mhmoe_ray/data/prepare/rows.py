"""Rows of encoders and vision models: chunks of documents become parts, and parts become shards and validation samples.

A row of an encoder has T (`data.seq_len`) tokens, and perhaps an image. A text with an image is one row, cut to T - 1
tokens. Another text becomes as many rows as it needs, each with a start token. An image without text is one row of
padding. A row of a vision model is an annotated image. A part is an Arrow file of rows, training documents first. A
shard has whole parts.
"""

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from mhmoe_ray.data.images.annotations import unpack
from mhmoe_ray.data.prepare.chunks import Chunk
from mhmoe_ray.data.prepare.packing import ShardResult
from mhmoe_ray.data.prepare.validation import ValidationSplit, is_validation, select_rows
from mhmoe_ray.data.shards.columns import TOKENS, padding_token, token_dtype
from mhmoe_ray.data.shards.files import SHARD_BYTES
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.data.shards.rows import (
    file_content,
    join_batches,
    map_rows,
    row_batch,
    row_bytes,
    tokens_of,
    write_row_shard,
)

SHARD_PARTS = 10_000
"""Largest number of parts of a shard. All are memory-mapped, and Linux allows 65,530 mappings by default."""


class RowCounts(BaseModel):
    """Counts of the rows in a part; those without `held_out` count training rows or documents."""

    samples: int = 0
    held_out_samples: int = 0
    images: int = 0
    """Training rows with an image."""
    image_bytes: int = 0
    targets: int = 0
    """Tokens without start tokens and padding."""
    padding: int = 0
    cut_documents: int = 0
    """Documents that were cut, or became several rows."""
    cut_tokens: int = 0
    """Tokens in no row, because their document was cut."""
    class_names: list[str] = []
    """All classes in the annotations of a vision model, sorted."""
    objects_without_mask: int = 0
    """All annotated objects with a box but no mask."""
    file_bytes: int = 0


def rows_file(folder: Path, name: str) -> Path:
    """Return the path of the file with a part's rows."""
    return folder / name[:2] / f"{name}.arrow"


def is_held_out(chunk: Chunk, document: int, fraction: float) -> bool:
    """Return whether a document is held out, by its record's image or else by its text."""
    image_hash = chunk.image_hashes[document] if chunk.image_hashes else ""
    return is_validation(image_hash or chunk.texts[document], fraction)


def update_digest(digest: "hashlib._Hash", chunk: Chunk, seq_len: int) -> None:
    """Add row length, images and annotations to a part's digest of texts and tokenizer."""
    digest.update(f"rows of {seq_len}".encode())
    if chunk.images is not None and chunk.image_hashes is not None:
        digest.update(repr([(bool(i), h) for i, h in zip(chunk.images, chunk.image_hashes, strict=True)]).encode())
    if chunk.annotations is not None:
        digest.update(f"annotations {chunk.annotations}".encode())


def make_rows(
    chunk: Chunk, documents: Sequence[Sequence[int]], validation_fraction: float, seq_len: int, token_bytes: int
) -> tuple[memoryview, RowCounts]:
    """Make the rows of a chunk's documents; return the content of their part's file, and the counts.

    `documents` has each document's tokens with the start token, or none.
    """
    counts, padding = RowCounts(), padding_token(token_bytes)
    train_rows, held_out_rows = list[tuple[np.ndarray, bytes]](), list[tuple[np.ndarray, bytes]]()
    for number, tokens in enumerate(documents):
        image = chunk.images[number] if chunk.images is not None else b""
        rows = [(row, image) for row in token_rows(tokens, bool(image), seq_len, padding, token_bytes)]
        if is_held_out(chunk, number, validation_fraction):
            held_out_rows += rows
            continue
        train_rows += rows
        counts.images += bool(image) * len(rows)
        counts.image_bytes += len(image)
        # Start tokens are not counted: each row of a text has one of its own, but the document has only one.
        targets = sum(int((row[1:] != padding).sum()) for row, _ in rows)
        counts.targets += targets
        counts.padding += sum(int((row == padding).sum()) for row, _ in rows)
        counts.cut_tokens += max(0, len(tokens) - 1) - targets
        counts.cut_documents += len(tokens) > seq_len
    counts.samples, counts.held_out_samples = len(train_rows), len(held_out_rows)
    rows = [*train_rows, *held_out_rows]
    if not rows:
        return memoryview(b""), counts
    content = file_content(row_batch(np.stack([row for row, _ in rows]), [image for _, image in rows]))
    counts.file_bytes = len(content)
    return content, counts


def make_annotated_rows(chunk: Chunk, validation_fraction: float) -> tuple[memoryview, RowCounts]:
    """Make the rows of a vision model's chunk, like `make_rows`."""
    assert chunk.images is not None
    assert chunk.annotations is not None
    held_out = [is_held_out(chunk, number, validation_fraction) for number in range(len(chunk.texts))]
    numbers = sorted(range(len(held_out)), key=lambda number: held_out[number])
    annotations = [unpack(content) for content in chunk.annotations]
    class_names = {name for annotation in annotations for name in annotation.class_names}
    trained_bytes = [len(image) for image, is_out in zip(chunk.images, held_out, strict=True) if not is_out]
    counts = RowCounts(
        samples=len(trained_bytes),
        held_out_samples=sum(held_out),
        images=len(trained_bytes),
        image_bytes=sum(trained_bytes),
        class_names=sorted(class_names),
        objects_without_mask=sum(i.mask is None for annotation in annotations for i in annotation.instances),
    )
    images, stored_annotations = ([column[n] for n in numbers] for column in (chunk.images, chunk.annotations))
    content = file_content(row_batch(None, images, stored_annotations))
    counts.file_bytes = len(content)
    return content, counts


def token_rows(
    tokens: Sequence[int], has_image: bool, seq_len: int, padding: int, token_bytes: int
) -> Iterator[np.ndarray]:
    """Yield the `seq_len` tokens of each row of a document, which may end with padding; with an image, one row."""
    width = seq_len - 1
    row_count = 1 if has_image else -(-max(0, len(tokens) - 1) // width)
    for number in range(row_count):
        row = np.full(seq_len, padding, token_dtype(token_bytes))
        if tokens:
            stretch = tokens[1 + number * width : 1 + (number + 1) * width]
            row[0] = tokens[0]
            row[1 : 1 + len(stretch)] = stretch
        yield row


class RowSlice(NamedTuple):
    """Training documents or held-out documents of a part, as a slice of its rows."""

    name: str
    start: int
    stop: int

    def map_batch(self, folder: Path) -> pa.RecordBatch:
        """Return the rows, memory-mapped from the part's file in the folder of all parts."""
        return map_rows(rows_file(folder, self.name)).slice(self.start, self.stop - self.start)


class RowPlan(NamedTuple):
    """Plan of one shard of a domain."""

    domain: str
    number: int
    """Number of the shard within the domain, from 0."""
    slices: list[RowSlice]
    padding: int
    whole_documents: int
    targets: int


class RowPart(NamedTuple):
    """Part of a domain, from which shards are planned."""

    name: str
    documents: int
    """Number of training documents."""
    counts: RowCounts


def plan_row_shards(domain: str, parts: Sequence[RowPart], row_bytes: int) -> list[RowPlan]:
    """Return the plans of a domain's shards, each of whole parts; `row_bytes` are those of a row's tokens.

    All but the last have at least `SHARD_BYTES` bytes or `SHARD_PARTS` parts.
    """
    plans, group, size = list[RowPlan](), list[RowPart](), 0
    for index, part in enumerate(parts):
        if part.counts.samples:
            group.append(part)
            size += part.counts.samples * row_bytes + part.counts.image_bytes
        if group and (size >= SHARD_BYTES or len(group) == SHARD_PARTS or index == len(parts) - 1):
            plans.append(
                RowPlan(
                    domain,
                    len(plans),
                    [RowSlice(member.name, 0, member.counts.samples) for member in group],
                    sum(member.counts.padding for member in group),
                    sum(member.documents - member.counts.cut_documents for member in group),
                    sum(member.counts.targets for member in group),
                )
            )
            group, size = [], 0
    return plans


def make_row_shard(row: dict[str, Any], *, folder: Path, parts: Path) -> dict[str, Any]:
    """Write the shard of a pickled `RowPlan` (`plan`); return a pickled `ShardResult` (`result`)."""
    plan: RowPlan = pickle.loads(row["plan"])
    batch = join_batches([row_slice.map_batch(parts) for row_slice in plan.slices])
    shard = write_row_shard(folder, f"train/{plan.domain}/{plan.number:05d}.arrow", batch)
    result = ShardResult(plan.domain, plan.number, shard, plan.padding, plan.whole_documents, plan.targets)
    return {"result": pickle.dumps(result)}


def write_validation_rows(
    folder: Path, parts: Path, held_out: dict[str, list[RowSlice]], max_samples: int, token_bytes: int
) -> ValidationSplit:
    """Select validation samples among the held-out rows (`select_rows`), and write their shards."""
    selected_rows = select_rows(
        {name: sum(row_slice.stop - row_slice.start for row_slice in slices) for name, slices in held_out.items()},
        max_samples,
    )
    counts, shards, targets = dict[str, int](), list[Shard](), 0
    batches, size = list[pa.RecordBatch](), 0

    def write() -> None:
        nonlocal batches, size
        shards.append(write_row_shard(folder, f"validation/{len(shards):05d}.arrow", join_batches(batches)))
        batches, size = [], 0

    for name, slices in held_out.items():
        selected, first_row = selected_rows[name], 0
        counts[name] = len(selected)
        for row_slice in slices:
            end_row = first_row + row_slice.stop - row_slice.start
            slice_indices = selected[(selected >= first_row) & (selected < end_row)] - first_row
            selected_batches: list[pa.RecordBatch] = []
            if len(slice_indices):
                # A part is mapped once, and only if it is read, because Linux limits the mappings of a process.
                rows = row_slice.map_batch(parts)
                selected_batches = [rows.slice(index, 1) for index in slice_indices.tolist()]
            for batch in selected_batches:
                if TOKENS in batch.schema.names:
                    tokens = tokens_of(batch, token_bytes)
                    targets += int((tokens[:, 1:] != padding_token(token_bytes)).sum())
                else:
                    targets += 1
                batches.append(batch)
                size += row_bytes(batch)
                if size >= SHARD_BYTES:
                    write()
            first_row = end_row
    if batches:
        write()
    return ValidationSplit(shards, counts, targets)
