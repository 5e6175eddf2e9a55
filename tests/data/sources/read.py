"""Readers of the files that a test wrote."""

from collections.abc import Iterator
from pathlib import Path

from mhmoe_ray.data.sources import BadLine, Document, FileReader, Tally, find_files
from mhmoe_ray.spec import DataSpec


def data_spec(path, max_document_mb=32.0, **source) -> DataSpec:
    """Return a data section whose only source is `web` at `path`; `source` has more keys of the source."""
    tree = {"sources": {"web": {"path": str(path), **source}}, "prepared": "prepared", "seq_len": 8}
    return DataSpec.model_validate(tree | {"max_document_mb": max_document_mb})


def read_source(path: Path | str, **keys) -> tuple[list[Document | BadLine], Tally]:
    """Return all documents and bad lines of a source, and the tally of its files."""
    spec, items, tally = data_spec(path, **keys), [], Tally()
    for file in find_files(spec):
        reader = FileReader(file, spec)
        items += reader
        tally += reader.tally
    assert tally.documents == sum(isinstance(i, Document) for i in items)
    assert tally.bad.total() == len(items) - tally.documents
    return items, tally


def iterate_source(path: Path | str, **keys) -> Iterator[Document | BadLine]:
    """Yield the documents and the bad lines of a source one by one."""
    spec = data_spec(path, **keys)
    for file in find_files(spec):
        yield from FileReader(file, spec)


def document_texts(items: list[Document | BadLine]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def bad_lines(items: list[Document | BadLine]) -> list[tuple[int, str]]:
    """Return the line number and the reason of each item that could not be read."""
    return [(item.line, item.reason) for item in items if isinstance(item, BadLine)]
