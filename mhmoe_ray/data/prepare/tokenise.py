"""A chunk of documents to a part: their tokens in one file, named by what they were made of.

A part that is there is not made again, so that a job that was killed goes on where it was, also when files were added,
moved or changed meanwhile.
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
from tokenizers import Tokenizer

from mhmoe_ray.data.prepare.chunks import Chunk
from mhmoe_ray.data.prepare.held_out import is_validation
from mhmoe_ray.data.prepare.parts import part_file
from mhmoe_ray.data.shards.files import token_dtype
from mhmoe_ray.data.sources import Tally
from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.runs.files import replace_file

BATCH = 1 << 18
"""Characters that are encoded in one call; an encoding takes some 50 times the memory of its text."""


class PartCounts(BaseModel):
    """What a part holds: the tokens of its training documents, then those of the held-out ones."""

    documents: int = 0
    """For training."""
    tokens: int = 0
    """Theirs, a start token for each document included."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    text_bytes: int = 0
    """UTF-8, of all of them."""


class Tokenised(NamedTuple):
    """A chunk that has become a part."""

    file: int
    chunk: int
    part: str
    """Its name; empty for a chunk without documents."""
    counts: PartCounts
    tally: Tally
    stopped: bool
    found: bool
    """The part was there already."""

    def as_row(self) -> dict[str, Any]:
        return {"tokenised": pickle.dumps(self)}

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> "Tokenised":
        tokenised = pickle.loads(row["tokenised"])
        assert isinstance(tokenised, cls)
        return tokenised


class Encoder:
    """Texts to parts, one process's. Made once in each process, since a large vocabulary takes seconds to load.

    Args:
        tokenizer: a tokenizer.json.
        parts: folder of the parts.
        validation_fraction: share of the documents that is held out.
        token_bytes: 2 or 4.
    """

    def __init__(self, tokenizer: Path, parts: Path, validation_fraction: float, token_bytes: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as CPUs do the same
        self._encoder = Tokenizer.from_file(str(tokenizer))
        self._encoder.encode_special_tokens = True  # in a text they are ordinary characters
        edges = boundaries(self._encoder)
        assert edges is not None, "checked where the tokenizer was made"
        self._start, self._dtype = edges.start, token_dtype(token_bytes)
        self._parts, self._fraction = parts, validation_fraction
        self._made_of = hashlib.sha256(tokenizer.read_bytes() + f"{validation_fraction} {token_bytes}".encode())

    def __call__(self, table: pa.Table) -> dict[str, Any]:
        """`Tokenised.as_row` of a table of one chunk, as a batch of Ray Data."""
        chunk = Chunk.of_table(table)
        name, counts, found = "", PartCounts(), False
        if chunk.texts:
            name = self._name(chunk.texts)
            described = self._parts / name[:2] / f"{name}.json"
            found = described.exists()
            if found:
                counts = PartCounts.model_validate_json(described.read_bytes())
            else:
                counts = self._write(name, chunk.texts)
                replace_file(described, counts.model_dump_json().encode())
        tokenised = Tokenised(chunk.file, chunk.number, name, counts, chunk.tally, chunk.stopped, found)
        return {key: [value] for key, value in tokenised.as_row().items()}

    def _name(self, texts: Iterable[str]) -> str:
        digest = self._made_of.copy()
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8))
            digest.update(data)
        return digest.hexdigest()[:40]

    def _write(self, name: str, texts: list[str]) -> PartCounts:
        counts, train, held_out = PartCounts(), list[np.ndarray](), list[np.ndarray]()
        for batch in _batches(texts):
            encodings = self._encoder.encode_batch_fast(batch, add_special_tokens=False)
            for text, encoding in zip(batch, encodings, strict=True):
                tokens = np.array([self._start, *encoding.ids], self._dtype)
                counts.text_bytes += len(text.encode())
                if is_validation(text, self._fraction):
                    held_out.append(tokens)
                    counts.held_out_tokens += len(tokens)
                else:
                    train.append(tokens)
                    counts.tokens += len(tokens)
        counts.documents, counts.held_out_documents = len(train), len(held_out)
        replace_file(part_file(self._parts, name), np.concatenate([*train, *held_out]).tobytes())
        return counts


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for text in texts:
        if batch and size + len(text) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield batch
