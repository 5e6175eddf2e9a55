"""Parquet files with a column of texts. A row is a document; what cannot be read is lost row group by row group."""

from collections.abc import Iterator

import pyarrow as pa

from mhmoe_ray.data.sources.columns import ERRORS, ROWS, as_bytes, documents_in, no_texts, open_parquet
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.storage import Storage, one_line
from mhmoe_ray.spec import SourceSpec


def read_parquet(
    storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """See `formats.Read`."""
    column = source.text_field or "text"
    row = 0
    try:
        with open_parquet(storage, file.path) as table:
            problem = no_texts(table.schema_arrow, column)
            if problem:
                yield BadLine(file.path, 1, Reason.LOST, problem)
                return
            in_dictionary = pa.types.is_dictionary(table.schema_arrow.field(column).type)
            total = max(1, table.metadata.num_rows)
            for group in range(table.num_row_groups):
                first, row = row, row + table.metadata.row_group(group).num_rows
                done = first
                rows = max(1, row - first) if in_dictionary else ROWS  # the dictionary comes whole with each batch
                try:
                    for batch in table.iter_batches(rows, [group], [column], use_threads=False):
                        yield from documents_in(as_bytes(batch.column(0)), file.path, done, limit)
                        done += len(batch)
                    if done != row:
                        raise ValueError(f"{done - first:,} of {row - first:,} rows are there")
                except ERRORS as e:
                    yield BadLine(file.path, done + 1, Reason.LOST, f"rows {done + 1:,} to {row:,}: {one_line(e)}")
                tally.bytes_read += file.size * row // total - file.size * first // total
    except ERRORS as e:
        yield BadLine(file.path, row + 1, Reason.LOST, one_line(e))
