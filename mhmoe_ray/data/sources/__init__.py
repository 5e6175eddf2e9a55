"""Sources: raw text of any supported format, read one document at a time.

    for file in find_files(spec.data):
        reading = Reading(file, spec.data)
        for item in reading:                # Document or BadLine
            ...
        reading.tally                       # documents, bytes, quarantined by reason, dropped by rule

find.py lists the files of a source and detects their format; reading.py reads one file and yields what items.py
defines. Bytes come through storage.py and compression.py. records.py reads JSON lines and plain text, columns.py reads
Parquet and Arrow streams, and redpajama_v2.py reads documents with the quality signals by which they are filtered.
Files of JSON lines and of text may be compressed with zstd or gzip, whatever their names say.
"""

from mhmoe_ray.data.sources.find import blocks_of, find_files
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.reading import Reading

__all__ = ["BadLine", "Document", "RawFile", "Reading", "Reason", "Tally", "blocks_of", "find_files"]
