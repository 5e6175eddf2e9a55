"""Reading one raw file of any format."""

from collections.abc import Iterator

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.sources.formats import READERS
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Tally
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import DataSpec


class Reading:
    """Iterating it gives the documents of a file and what could not be read of it, one at a time and in their order; no
    state of the file raises an error.

    Args:
        file: one of `find_files(spec)`.
        spec: the data section it was found by.
    """

    def __init__(self, file: RawFile, spec: DataSpec) -> None:
        self.tally = Tally()
        """Of what was given so far."""
        self._file = file
        self._items = _items(file, spec, self.tally)

    def __iter__(self) -> Iterator[Document | BadLine]:
        tally, inflation = self.tally, self._file.inflation
        for item in self._items:
            tally.text_bytes = tally.bytes_read * inflation
            if isinstance(item, Document):
                tally.documents += 1
            else:
                tally.count_bad(item)
            yield item
        tally.files = 1
        tally.damaged = int(any(reason.loses_lines for reason in tally.bad))
        tally.bytes_read = self._file.size
        tally.text_bytes = tally.bytes_read * inflation


def _items(file: RawFile, spec: DataSpec, tally: Tally) -> Iterator[Document | BadLine]:
    source = spec.sources[source_of(file.domain)]
    storage = Storage(source.path)
    limit = int(spec.max_document_mb * 1e6)
    return READERS[file.format](storage, file, source, limit, tally)
