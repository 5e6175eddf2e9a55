"""Records into shards of JSON lines, compressed with zstd."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

Record = dict[str, Any]

SHARD_BYTES = 16_000_000
"""Of JSON before compression, after which a shard is full."""


class Shards:
    """Writes a domain's records; a shard has its name only once it is whole.

    Attributes:
        documents: written so far.
        bytes: of their text in UTF-8.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.documents, self.bytes = folder, 0, 0
        self._out: pa.NativeFile | None = None
        self._size = self._count = 0

    def add(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if self._size and self._size + len(line) > SHARD_BYTES:
            self.close()
        if self._out is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._out = pa.output_stream(str(self._path.with_suffix(".part")), compression="zstd")
        self._out.write(line)
        self._size += len(line)
        self.documents += 1
        self.bytes += len(record["text"].encode())

    def close(self) -> None:
        if self._out is None:
            return
        self._out.close()
        self._path.with_suffix(".part").replace(self._path)
        self._out, self._size, self._count = None, 0, self._count + 1

    def abandon(self) -> None:
        """Remove what was written, where it is less than a shard."""
        if self._out is not None:
            self._out.close()
            self._path.with_suffix(".part").unlink()
            self._out = None
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    @property
    def _path(self) -> Path:
        return self.folder / f"sample-{self._count:05d}.jsonl.zst"


def write_records(folder: Path, records: Iterable[Record]) -> int:
    """Write a whole domain; returns its documents."""
    shards = Shards(folder)
    for record in records:
        shards.add(record)
    shards.close()
    return shards.documents


def remove_sample(folder: Path) -> None:
    """Remove the shards of a sample written here before: a shorter one would leave some of them among its own."""
    for domain in [*folder.glob("redpajama/*"), *folder.glob("multilingual/*")]:
        for path in domain.glob("sample*"):
            if path.name.endswith((".jsonl.zst", ".part")):
                path.unlink()
        if domain.is_dir() and not any(domain.iterdir()):
            domain.rmdir()
