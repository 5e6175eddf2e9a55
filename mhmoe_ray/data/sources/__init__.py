"""Raw text of any supported format, one document at a time.

    for file in find_files(spec.data):
        reading = Reading(file, spec.data)
        for item in reading:                # Document or BadLine
            ...
        reading.tally                       # documents, bytes, quarantined by reason, left out by rule

storage.py -> compression.py -> records.py, or columns.py of a table -> a format's file in formats/ -> reading.py, which
gives what items.py describes. records.py reads lines of JSON, find.py says which files there are, redpajama_v2.py which
documents filters keep.
Files of JSON lines and of text may be zstd or gzip, whatever their names say.
"""

from mhmoe_ray.data.sources.find import blocks_of, find_files
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.reading import Reading

__all__ = ["BadLine", "Document", "RawFile", "Reading", "Reason", "Tally", "blocks_of", "find_files"]
