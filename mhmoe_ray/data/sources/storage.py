"""Storage of raw files: a local path, or an s3:// or gs:// URI, all through pyarrow's file systems.

Credentials and regions are found as the vendors' own tools find them (environment, ~/.aws, the machine's role).
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from mhmoe_ray.data.sources.items import DamageError, RawFile, Tally
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import STORES, object_store, unknown_scheme

CHUNK = 1 << 20  # a read
OBJECT_CHUNK = 8 << 20  # the same on object stores, where each one is a request and takes its time
_WILD = re.compile(r"[*?\[]")


class Listed(NamedTuple):
    path: str
    """Path of the file, in the form that `Storage.open` takes and messages show."""
    size: int


class Listing(NamedTuple):
    root: str
    """Folder that all files are below: the one before the first wildcard, or the one of a single file."""
    files: list[Listed]
    """Files that the source's path selects, in the order of their paths."""
    paths: set[str]
    """Paths of all files that exist below the root, whether or not a pattern selects them."""


class Storage:
    """The files of one source.

    Args:
        path: the path as a spec gives it; the query of a URI says how to reach its server.

    Raises:
        DataError: the scheme is not known, or the server cannot be reached.
    """

    def __init__(self, path: str) -> None:
        scheme, separator, rest = path.partition("://")
        if not separator or scheme == "file":
            self._fs, self._prefix, self._pattern = fs.LocalFileSystem(), "", rest if separator else path
            self._wild = _WILD
            return
        if scheme not in STORES:
            raise DataError(f"path {path}", *unknown_scheme(scheme))
        self._pattern, _, query = rest.partition("?")
        self._wild = re.compile(r"[*\[]")  # a question mark begins the query
        self._prefix = f"{scheme}://"
        try:
            host, slash, below = self._pattern.partition("/")
            self._fs, bucket = object_store(scheme, host, query)
            self._pattern = bucket + slash + below  # without a user's name, which a host may have
        except OSError as e:
            raise DataError(f"path {path}", str(e), "correct it, and the credentials in the environment") from e

    @property
    def is_pattern(self) -> bool:
        """Whether the path has wildcards and is not the name of an existing file or folder."""
        return bool(self._wild.search(self._pattern)) and not Path(self._pattern).exists()

    def files(self) -> Listing:
        """List all files. Hidden ones (with a leading dot or underscore) are left out of `files`.

        Raises:
            DataError: the pattern is invalid.
            FileNotFoundError: nothing of this name exists.
            OSError: the path cannot be listed.
        """
        parts = self._pattern.rstrip("/").split("/")
        plain = len(parts)
        if self.is_pattern:
            plain = next(i for i, part in enumerate(parts) if self._wild.search(part))
        root = "/".join(parts[:plain]) or "/"
        info = self._ask(root)
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(f"there is no folder {self._prefix}{root}")
        if info.type == fs.FileType.File:
            alone = Listed(self._prefix + root, info.size)
            return Listing(self._prefix + root.rpartition("/")[0], [alone], {alone.path})
        found = list(_local(root) if self._prefix == "" else self._objects(root))
        paths = {self._prefix + file.path for file in found}
        if plain < len(parts):
            pattern = _translate(parts[plain:])
            found = [file for file in found if pattern.fullmatch(below(root, file.path))]
        wanted = (file for file in found if not re.search(r"(^|/)[._]", below(root, file.path)))
        ordered = sorted(wanted, key=lambda file: file.path.split("/"))
        files = [Listed(self._prefix + file.path, file.size) for file in ordered]
        return Listing(self._prefix + root, files, paths)

    def _ask(self, path: str) -> fs.FileInfo:
        try:
            return self._fs.get_file_info(path)
        except (pa.ArrowException, ValueError) as e:  # an empty name between two slashes, a NUL
            raise OSError(str(e)) from e

    def _objects(self, root: str) -> Iterator[Listed]:
        for info in self._fs.get_file_info(fs.FileSelector(root, recursive=True)):
            if info.type == fs.FileType.File:
                yield Listed(info.path, info.size)

    def open(self, path: str) -> pa.NativeFile:
        """Open a file to be read from its start, as it is stored.

        Raises:
            OSError: there is no such file, or it cannot be reached.
        """
        return self._fs.open_input_stream(path.removeprefix(self._prefix), compression=None)

    def open_anywhere(self, path: str) -> pa.NativeFile:
        """Open a file for random access. It is never mapped into memory: a mapped file that shrinks ends the process.

        Raises:
            OSError: there is no such file, or it cannot be reached.
        """
        return self._fs.open_input_file(path.removeprefix(self._prefix))

    def chunks(self, file: RawFile, tally: Tally) -> Iterator[bytes]:
        """Yield the bytes of a file as they are stored, and count them in `tally.bytes_read`.

        Raises:
            DamageError: the file vanished, shrank, or cannot be read on.
        """
        read = 0
        try:
            with self.open(file.path) as stream:
                while chunk := stream.read(OBJECT_CHUNK if self._prefix else CHUNK):
                    read += len(chunk)
                    tally.bytes_read += len(chunk)
                    yield chunk
        except FileNotFoundError as e:
            raise DamageError("it is not there any more") from e
        except OSError as e:
            raise DamageError(one_line(e)) from e
        if read < file.size:
            raise DamageError(f"it ended after {read:,} bytes, and had {file.size:,} when it was listed")


def one_line(error: Exception) -> str:
    """Return pyarrow's error message without its details and line breaks."""
    return " ".join(str(error).split(". Detail:")[0].split())


def below(root: str, path: str) -> str:
    """Return the path of a file relative to a folder that holds it."""
    return path.removeprefix(root.rstrip("/") + "/")


def _translate(parts: list[str]) -> re.Pattern[str]:
    """Translate the components of a path pattern into one regular expression; ** stands for any number of folders.

    Raises:
        DataError: a range in brackets is invalid.
    """
    made = ""
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            made += ".*" if last else "(?:.*/)?"
            continue
        for token in re.findall(r"\[[^]]+\]|.", part):
            if token[0] == "[" and len(token) > 2:
                made += "[^" + token[2:] if token[1] == "!" else token
            else:
                made += {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
        made += "" if last else "/"
    try:
        return re.compile(made)
    except re.error as e:
        raise DataError(f"pattern {'/'.join(parts)}", e.msg, "correct it") from e


def _local(folder: str, above: frozenset[str] = frozenset()) -> Iterator[Listed]:
    """Yield all files below a local folder, following links, since users often link to data elsewhere.

    A link that leads nowhere is yielded as a file of size 0 (a file that has vanished); a link to a folder in `above`
    is not followed, since the walk would never end.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in Path(folder).iterdir():
        try:
            info = path.stat()
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            yield Listed(str(path), 0)
            continue
        if stat.S_ISDIR(info.st_mode):
            yield from _local(str(path), above | {real})
        elif stat.S_ISREG(info.st_mode):
            yield Listed(str(path), info.st_size)
