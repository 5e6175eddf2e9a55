"""Raw text of any supported format, one document at a time.

    for file in find_files(spec.data):
        reading = Reading(file, spec.data)
        for item in reading:                # Document or BadLine
            ...
        reading.tally                       # documents, bytes, quarantined by reason, left out by rule

| format       | a document is                                       | read by         |
| ------------ | --------------------------------------------------- | --------------- |
| jsonl        | a line: RedPajama-1T, multilingual folders          | jsonl.py        |
| redpajama-v2 | a line that passes the source's filters             | redpajama_v2.py |
| parquet      | a row                                               | columns.py      |
| huggingface  | a row of a folder that `save_to_disk` wrote         | columns.py      |
| text         | a file, or a part of it between delimiter lines     | text.py         |

storage.py -> compression.py -> lines.py -> a format's file -> reading.py, which gives what items.py describes; find.py
says which files there are, signals.py which documents filters keep.
Files of JSON lines and of text may be zstd or gzip, whatever their names say.
"""

from mhmoe_ray.data.sources.find import find_files
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.reading import Reading

__all__ = ["BadLine", "Document", "RawFile", "Reading", "Reason", "Tally", "find_files"]
