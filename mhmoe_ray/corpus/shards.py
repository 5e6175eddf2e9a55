"""Writers of shards, and the removal of an earlier sample's files.

Text becomes JSON lines, compressed with zstd. Images become WebDataset shards: tar files in which the files of an image
share a key.
"""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from mhmoe_ray.corpus.captions import Concept

Record = dict[str, Any]


class ShardWriter:
    """Base of the writers of numbered shards in a folder. The caller must call `close`.

    Attributes:
        count: number of records or images that have been added.
    """

    shard_name: ClassVar[str]
    """Format of the name of a shard, given its number."""
    max_bytes: ClassVar[int]
    """Largest number of bytes in a shard; a single entry may be larger."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self._file: Any = None
        self._shard_bytes = self._shard_index = 0

    def _open(self, path: Path) -> Any:
        raise NotImplementedError

    def _file_with_room(self, size: int) -> Any:
        """Return the open shard, or a new one if it has no room for an entry of `size` bytes, and count the entry."""
        # An empty shard takes an entry of any size, so one that is larger than `max_bytes` gets a shard for itself.
        if self._shard_bytes and self._shard_bytes + size > self.max_bytes:
            self.close()
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open(self._part_path)
        self._shard_bytes += size
        self.count += 1
        return self._file

    def close(self) -> None:
        """Finish the open shard, if there is one, and give it its final name."""
        if self._file is None:
            return
        self._file.close()
        self._part_path.replace(self._path)
        self._file, self._shard_bytes, self._shard_index = None, 0, self._shard_index + 1

    def discard(self) -> None:
        """Remove the unfinished shard, and the folder if it is then empty."""
        if self._file is not None:
            self._file.close()
            self._file = None
            remove_files(self.folder, re.escape(self._part_path.name))

    @property
    def _path(self) -> Path:
        return self.folder / self.shard_name.format(self._shard_index)

    @property
    def _part_path(self) -> Path:
        # A shard has another name until it is complete, so that nobody reads an unfinished shard.
        return self._path.with_suffix(".part")


class TextShardWriter(ShardWriter):
    """Writer of a domain's records.

    Attributes:
        text_bytes: bytes of the documents' text in UTF-8.
    """

    shard_name = "sample-{:05d}.jsonl.zst"
    max_bytes = 16_000_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.text_bytes = 0

    def _open(self, path: Path) -> pa.NativeFile:
        return pa.output_stream(str(path), compression="zstd")

    def add(self, record: Record) -> None:
        """Write a record."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._file_with_room(len(line)).write(line)
        texts = [record["text"]] if "text" in record else [message["content"] for message in record["messages"]]
        self.text_bytes += sum(len(text.encode()) for text in texts)


class ImageShardWriter(ShardWriter):
    """Writer of images with captions, whose shards hold neither timestamps nor the names of users."""

    shard_name = "{:05d}.tar"
    # The end of a tar file takes up to one record.
    max_bytes = 64_000_000 - tarfile.RECORDSIZE

    def _open(self, path: Path) -> tarfile.TarFile:
        return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)

    def add(self, concept: Concept, png: bytes, artist: str, license: str, same_drawing_as: str | None) -> None:
        """Write an image with its caption and its JSON file.

        `license` is an SPDX expression. `same_drawing_as` is the key of the artist's first concept with the same
        drawing; None for this first one.
        """
        record = {
            "concept": concept.key,
            "name": concept.name,
            "keywords": concept.keywords,
            "class": concept.class_name,
            "group": concept.group,
            "artist": artist,
            "license": license,
            "captions": dict(concept.captions),
            **({} if same_drawing_as is None else {"same_drawing_as": same_drawing_as}),
        }
        files = {
            "json": json.dumps(record, ensure_ascii=False).encode(),
            "png": png,
            "txt": concept.name.encode(),
        }
        # In a tar file, a header of one block precedes the content of a file, which is filled up to whole blocks.
        size = sum(tarfile.BLOCKSIZE * (1 + -(-len(content) // tarfile.BLOCKSIZE)) for content in files.values())
        tar = self._file_with_room(size)
        for suffix, content in files.items():
            # A new `TarInfo` has time 0 and user 0, so the bytes of the shard do not depend on when and by whom it is
            # written.
            member = tarfile.TarInfo(f"{concept.key}.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def remove_files(folder: Path, name_pattern: str) -> None:
    """Remove the files of a folder whose names match a regular expression, and the folder if it is then empty."""
    # A new sample that is shorter would overwrite only some of an earlier sample's files, so all of them are removed
    # first.
    if folder.is_dir():
        for path in folder.iterdir():
            if re.fullmatch(name_pattern, path.name):
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
