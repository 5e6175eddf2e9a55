"""Raw text of any supported format, one document at a time.

    for file in find_files(spec.data):
        reading = Reading(file, spec.data)
        for item in reading:                # Document or BadLine
            ...
        reading.tally                       # documents, bytes, quarantined by reason, left out by rule

find.py says which files there are and of which format; reading.py reads one, which gives what items.py describes.
Bytes come through storage.py and compression.py. records.py reads JSON lines and plain text, columns.py Parquet and
Arrow streams, and redpajama_v2.py documents with the signals that its filters go by.
Files of JSON lines and of text may be zstd or gzip, whatever their names say.
"""

from mhmoe_ray.data.sources.find import blocks_of, find_files
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.reading import Reading

__all__ = ["BadLine", "Document", "RawFile", "Reading", "Reason", "Tally", "blocks_of", "find_files"]
