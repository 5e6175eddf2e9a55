"""Sources: raw text and images of any supported format, read one document at a time.

    for file in find_files(spec.data):
        reader = FileReader(file, spec.data)
        for item in reader:                 # Document or BadLine
            ...
        reader.tally                        # counts: documents, bytes, unreadable lines, filtered documents

find.py lists the files of a source and detects their format; reading.py reads one file and yields the items that
items.py defines. Bytes come through storage.py and compression.py, those of the Hugging Face hub through hub.py.
records.py reads JSON lines and plain text, columns.py reads Parquet and Arrow streams, redpajama_v2.py reads documents
and filters them by quality signals, chat.py reads conversations, and preferences.py reads pairs of them. images.py
reads folders of images, coco.py reads COCO's captions and objects, whose masks masks.py checks, questions.py reads
VQAv2's questions, whose answers answer_text.py normalizes, and NLVR2's sentences, and webdataset.py reads
images in the tar files that tar.py parses. JSON, text and tar files may be compressed with zstd or gzip, which their
first bytes show.
"""

from mhmoe_ray.data.sources.find import file_blocks, find_files, version_hash
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.reading import FileReader

__all__ = [
    "BadLine",
    "Document",
    "FileReader",
    "RawFile",
    "Reason",
    "Tally",
    "file_blocks",
    "find_files",
    "version_hash",
]
