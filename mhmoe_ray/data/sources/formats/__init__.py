"""Reading files of one format; one file here for each format of `spec/data.py`, each entered in READERS.

| format       | a document is                                       | read by         |
| ------------ | --------------------------------------------------- | --------------- |
| jsonl        | a line: RedPajama-1T, multilingual folders          | jsonl.py        |
| redpajama-v2 | a line that passes the source's filters             | redpajama_v2.py |
| parquet      | a row                                               | parquet.py      |
| huggingface  | a row of a folder that `save_to_disk` wrote         | huggingface.py  |
| text         | a file, or a part of it between delimiter lines     | text.py         |
"""

from collections.abc import Iterator
from typing import Protocol

from mhmoe_ray.data.sources.formats.huggingface import read_huggingface
from mhmoe_ray.data.sources.formats.jsonl import read_jsonl
from mhmoe_ray.data.sources.formats.parquet import read_parquet
from mhmoe_ray.data.sources.formats.redpajama_v2 import read_redpajama_v2
from mhmoe_ray.data.sources.formats.text import read_text
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Tally
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import Format, SourceSpec


class Read(Protocol):
    def __call__(
        self, storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
    ) -> Iterator[Document | BadLine]:
        """The documents of a file and what could not be read of it, in their order; no state of the file is an error.

        Args:
            storage: where the file is.
            file: which one.
            source: what it is a file of, with the name of the text's key or column, and other keys of this format.
            limit: of a document, in bytes.
            tally: whose `bytes_read` and `dropped` are kept up to date.
        """


READERS: dict[Format, Read] = {
    "jsonl": read_jsonl,
    "redpajama-v2": read_redpajama_v2,
    "parquet": read_parquet,
    "text": read_text,
    "huggingface": read_huggingface,
}
