"""Writer of pictures with captions as WebDataset shards: tar files in which a picture's files share a key."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from mhmoe_ray.corpus.captions import Concept

SHARD_BYTES = 64_000_000
"""Largest size of a shard in bytes; a single picture with its captions may be larger."""


class PictureWriter:
    """Writer of pictures into the shards of a folder. The caller must call `close`.

    The shards depend only on the pictures: they hold neither timestamps nor the names of users.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.picture_count = folder, 0
        self._tar: tarfile.TarFile | None = None
        self._shard_index = 0

    def add(self, concept: Concept, png: bytes, artist: str, license: str, same_drawing_as: str | None) -> None:
        """Write a picture with its caption and its JSON file, into a new shard if the open one has no room for them.

        `license` is an SPDX expression. `same_drawing_as` is the key of the artist's first concept with the same
        drawing; None for this first one.
        """
        files = {
            "json": json.dumps(_record(concept, artist, license, same_drawing_as), ensure_ascii=False).encode(),
            "png": png,
            "txt": concept.name.encode(),
        }
        # In a tar file, a header of one block precedes the content of a file, which is filled up to whole blocks.
        size = sum(tarfile.BLOCKSIZE * (1 + -(-len(content) // tarfile.BLOCKSIZE)) for content in files.values())
        if self._tar and self._tar.offset and self._tar.offset + size + tarfile.RECORDSIZE > SHARD_BYTES:
            self.close()
        if self._tar is None:
            # A shard has another name until it is complete, so that nobody reads an unfinished shard.
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._path.with_suffix(".part")
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - `close` closes it
        for suffix, content in files.items():
            # A new `TarInfo` has time 0 and user 0, so the bytes of the shard do not depend on when and by whom it is
            # written.
            member = tarfile.TarInfo(f"{concept.key}.{suffix}")
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self.picture_count += 1

    def close(self) -> None:
        """Finish the open shard, if there is one, and give it its final name."""
        if self._tar is None:
            return
        self._tar.close()
        self._path.with_suffix(".part").replace(self._path)
        self._tar, self._shard_index = None, self._shard_index + 1

    @property
    def _path(self) -> Path:
        return self.folder / f"{self._shard_index:05d}.tar"


def _record(concept: Concept, artist: str, license: str, same_drawing_as: str | None) -> dict[str, Any]:
    return {
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
