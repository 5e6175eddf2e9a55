"""JSON lines: RedPajama-1T's seven domains and most other corpora. A line is a document."""

from collections.abc import Iterator

from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Tally
from mhmoe_ray.data.sources.records import document_of, read_records
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import SourceSpec


def read_jsonl(
    storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """See `formats.Read`."""
    for record in read_records(storage, file, limit, tally):
        yield record if isinstance(record, BadLine) else document_of(record, source.text_field or "text", file.path)
