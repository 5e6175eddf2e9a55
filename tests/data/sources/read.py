"""Reading back the files that a test wrote."""

from collections.abc import Iterator
from pathlib import Path

from mhmoe_ray.data.sources import BadLine, Document, Reading, Tally, find_files
from mhmoe_ray.spec import DataSpec


def data_spec(path, max_document_mb=32.0, **source) -> DataSpec:
    tree = {"sources": {"web": {"path": str(path), **source}}, "prepared": "prepared", "seq_len": 8}
    return DataSpec.model_validate(tree | {"max_document_mb": max_document_mb})


def read(path: Path | str, **keys) -> tuple[list[Document | BadLine], Tally]:
    """Return everything that a source gives, and the tally of all its files."""
    spec, items, tally = data_spec(path, **keys), [], Tally()
    for file in find_files(spec):
        reading = Reading(file, spec)
        items += reading
        tally += reading.tally
    assert tally.documents == sum(isinstance(i, Document) for i in items)
    assert tally.bad.total() == len(items) - tally.documents
    return items, tally


def items_of(path: Path | str, **keys) -> Iterator[Document | BadLine]:
    """Yield everything that a source gives, one item at a time."""
    spec = data_spec(path, **keys)
    for file in find_files(spec):
        yield from Reading(file, spec)


def texts(items: list[Document | BadLine]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def bad(items: list[Document | BadLine]) -> list[tuple[int, str]]:
    """Return (line, reason) of each part that could not be read."""
    return [(item.line, item.reason) for item in items if isinstance(item, BadLine)]
