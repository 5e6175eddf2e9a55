"""The Arrow streams that Hugging Face's `save_to_disk` leaves. A row is a document; what cannot be read is lost from
the damaged batch on."""

import struct
from collections.abc import Iterator

import pyarrow as pa

from mhmoe_ray.data.sources.columns import ERRORS, as_bytes, documents_in, no_texts
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.storage import Storage, one_line
from mhmoe_ray.spec import SourceSpec

_END_OF_STREAM = struct.pack("<Ii", 0xFFFFFFFF, 0)


def read_huggingface(
    storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """See `formats.Read`."""
    column = source.text_field or "text"
    row = 0
    try:
        with storage.open_anywhere(file.path) as stream:
            stream.seek(max(0, stream.size() - len(_END_OF_STREAM)))
            cut = stream.read() != _END_OF_STREAM
            stream.seek(0)
            with pa.ipc.open_stream(stream) as batches:
                problem = no_texts(batches.schema, column)
                if problem:
                    yield BadLine(file.path, 1, Reason.LOST, problem)
                    return
                for batch in batches:
                    yield from documents_in(as_bytes(batch.column(column)), file.path, row, limit)
                    row += len(batch)
                    tally.bytes_read = stream.tell()
        if cut:
            yield BadLine(file.path, row + 1, Reason.LOST, "its end is cut off")
    except ERRORS as e:
        yield BadLine(file.path, row + 1, Reason.LOST, one_line(e))
