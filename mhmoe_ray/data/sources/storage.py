"""Access to raw files at a local path, or at an s3://, gs:// or hf:// URI, through pyarrow's file systems.

Credentials and regions come from the same places as for the vendors' tools (environment, ~/.aws, the machine's role).
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from mhmoe_ray.data.sources.items import DamageError, RawFile, Tally
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import (
    STORES,
    Store,
    explain_error,
    is_special,
    object_store,
    refusal_reasons,
    short_message,
    unknown_scheme,
)

CHUNK_BYTES = 1 << 20
# On an object store each read is a request with a latency, so reads are larger than from local files.
OBJECT_CHUNK_BYTES = 8 << 20
_WILDCARDS = re.compile(r"[*?\[]")


def _open_hub(scheme: str, bucket: str, query: str) -> tuple[fs.FileSystem, str]:
    # The hub's client takes a third of a second to import.
    from mhmoe_ray.data.sources.hub import open_hub

    return open_hub(scheme, bucket, query)


SOURCE_STORES: dict[str, Store] = {"hf": _open_hub}
"""Functions that open stores for sources alone, by URI scheme."""


class ListedFile(NamedTuple):
    """File of a listing, with its path as `Storage.open` takes it and its size in bytes."""

    path: str
    size: int


class Listing(NamedTuple):
    """Files of a source, and the folder that contains them."""

    root: str
    """Path up to the first wildcard, or the folder of a single file."""
    files: list[ListedFile]
    """Files that the source's path selects, in the order of their paths."""
    paths: set[str]
    """All files below the root, whether or not a pattern selects them."""


class Storage:
    """Access to the files of one source.

    The path of the spec is a folder, a file or a pattern; the query of a URI has options of the object store, such as
    its region. An unknown scheme, or an object store that cannot be opened, is a DataError.
    """

    def __init__(self, path: str) -> None:
        scheme, separator, location = path.partition("://")
        if not separator:
            self._fs, self._prefix, self._pattern = fs.LocalFileSystem(), "", path
            self._wildcards = _WILDCARDS
            return
        if scheme not in STORES and scheme not in SOURCE_STORES:
            raise DataError(f"path {path}", *unknown_scheme(scheme))
        self._pattern, _, query = location.partition("?")
        # In a URI a question mark begins the query, so it is not a wildcard.
        self._wildcards = re.compile(r"[*\[]")
        self._prefix = f"{scheme}://"
        try:
            host, slash, key = self._pattern.partition("/")
            self._fs, bucket = SOURCE_STORES.get(scheme, object_store)(scheme, host, query)
            # The bucket replaces the host in the pattern, because the host may also have a user's name.
            self._pattern = bucket + slash + key
        except OSError as e:
            fix = "correct it, and the credentials in the environment"
            raise DataError(f"path {path}", *explain_error(e, fix)) from e

    @property
    def is_pattern(self) -> bool:
        """True if the path has wildcards and is not the name of an existing file or folder."""
        # The name of a local file may contain the characters of a wildcard, so the path of an existing file is not a
        # pattern.
        return bool(self._wildcards.search(self._pattern)) and not Path(self._pattern).exists()

    def list_files(self) -> Listing:
        """List the files that the path selects, and all paths below its root.

        Names with a leading dot or underscore, and all files below such folders, are left out of `Listing.files`. An
        invalid pattern is a DataError, a root that does not exist a FileNotFoundError, and any other failure an
        OSError.
        """
        root, pattern_parts = self._split_pattern()
        info = self._file_info(root)
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(f"there is no file or folder {self._prefix}{root}")
        if info.type == fs.FileType.File:
            single_file = ListedFile(self._prefix + root, info.size)
            return Listing(self._prefix + root.rpartition("/")[0], [single_file], {single_file.path})
        if self._prefix:
            infos = self._fs.get_file_info(fs.FileSelector(root, recursive=True))
            all_files = [ListedFile(info.path, info.size) for info in infos if info.type == fs.FileType.File]
        else:
            all_files = list(_list_local(root))
        paths = {self._prefix + file.path for file in all_files}
        if pattern_parts:
            pattern = _pattern_regex(pattern_parts)
            all_files = [file for file in all_files if pattern.fullmatch(relative_path(root, file.path))]
        visible_files = (file for file in all_files if not re.search(r"(^|/)[._]", relative_path(root, file.path)))
        sorted_files = sorted(visible_files, key=lambda file: file.path.split("/"))
        files = [ListedFile(self._prefix + file.path, file.size) for file in sorted_files]
        return Listing(self._prefix + root, files, paths)

    def missing_paths(self, paths: Sequence[str]) -> list[str]:
        """Return those of the paths at which there is no file; a folder that cannot be listed is an OSError."""
        if not self._prefix:
            return [path for path in paths if not os.path.lexists(path)]
        # A listing of the folder above each file's folder takes less time than a request for each file.
        existing_paths = set[str]()
        for folder in {path.rsplit("/", 2)[0] for path in paths}:
            selector = fs.FileSelector(folder.removeprefix(self._prefix), allow_not_found=True, recursive=True)
            existing_paths |= {self._prefix + info.path for info in self._fs.get_file_info(selector)}
        return [path for path in paths if path not in existing_paths]

    def modification_times(self, paths: Sequence[str]) -> list[int | None]:
        """Return each file's modification time in ns since the epoch, None if it vanished; a failure is an OSError."""
        if not self._prefix:
            return [info.mtime_ns for info in self._fs.get_file_info([*paths])]
        # On an object store, one listing takes less time than a request for each file.
        root, _ = self._split_pattern()
        info = self._file_info(root)
        is_file = info.type == fs.FileType.File
        infos = [info] if is_file else self._fs.get_file_info(fs.FileSelector(root, recursive=True))
        times = {self._prefix + file_info.path: file_info.mtime_ns for file_info in infos}
        return [times.get(path) for path in paths]

    def root(self) -> str:
        """Return `Listing.root` without listing the files; a path that cannot be read is an OSError."""
        root, _ = self._split_pattern()
        is_file = self._file_info(root).type == fs.FileType.File
        return self._prefix + (root.rpartition("/")[0] if is_file else root)

    def _split_pattern(self) -> tuple[str, list[str]]:
        """Split the path before the first component with a wildcard."""
        parts = self._pattern.rstrip("/").split("/")
        root_depth = len(parts)
        if self.is_pattern:
            root_depth = next(i for i, part in enumerate(parts) if self._wildcards.search(part))
        return "/".join(parts[:root_depth]) or "/", parts[root_depth:]

    def _file_info(self, path: str) -> fs.FileInfo:
        try:
            with refusal_reasons(self._fs, path):
                return self._fs.get_file_info(path)
        # pyarrow raises these exceptions for a path with an empty name between two slashes or with a NUL.
        except (pa.ArrowException, ValueError) as e:
            raise OSError(str(e)) from e

    def open(self, path: str) -> pa.NativeFile:
        """Open a file for reading from its start, without decompression; a failure is an OSError."""
        return self._fs.open_input_stream(self._regular_file(path), compression=None)

    def open_seekable(self, path: str) -> pa.NativeFile:
        """Open a file for reading at any offset; a failure is an OSError."""
        # The file is not memory-mapped: a mapped file that shrinks would crash the process.
        return self._fs.open_input_file(self._regular_file(path))

    def _regular_file(self, path: str) -> str:
        """Return a path in the file system; a local pipe, which would never end, is an OSError."""
        path = path.removeprefix(self._prefix)
        # pyarrow has its own error for a broken link.
        if isinstance(self._fs, fs.LocalFileSystem) and Path(path).exists() and is_special(Path(path)):
            raise OSError(errno.EINVAL, "it is no regular file", path)
        return path

    @property
    def _chunk_bytes(self) -> int:
        return OBJECT_CHUNK_BYTES if self._prefix else CHUNK_BYTES

    def read_bytes(self, path: str, limit: int) -> bytes | None:
        """Return the content of a file, or None if it has more than `limit` bytes; a failure is an OSError."""
        content = bytearray()
        try:
            with self.open(path) as stream:
                while len(content) <= limit and (chunk := stream.read(self._chunk_bytes)):
                    content += chunk
        # pyarrow raises these exceptions for a malformed path.
        except (pa.ArrowException, ValueError) as e:
            raise OSError(str(e)) from e
        return bytes(content) if len(content) <= limit else None

    def chunks(self, file: RawFile, tally: Tally) -> Iterator[bytes]:
        """Yield and count a file's stored bytes; one that vanished, shrank or cannot be read is a DamageError."""
        read_bytes = 0
        try:
            with self.open(file.path) as stream:
                while chunk := stream.read(self._chunk_bytes):
                    read_bytes += len(chunk)
                    tally.bytes_read += len(chunk)
                    yield chunk
        except FileNotFoundError as e:
            raise DamageError("it no longer exists") from e
        except OSError as e:
            raise DamageError(short_message(e)) from e
        if read_bytes < file.size:
            raise DamageError(f"it ended after {read_bytes:,} bytes, but had {file.size:,} when it was listed")


def relative_path(root: str, path: str) -> str:
    """Return a file's path relative to a folder that contains it."""
    return path.removeprefix(root.rstrip("/") + "/")


def leaves_folder(name: str) -> bool:
    """Return whether a name in somebody else's file is no path below the folder of that file."""
    return name.startswith("/") or ".." in name.split("/")


def _pattern_regex(parts: list[str]) -> re.Pattern[str]:
    """Translate the components of a path pattern into a regular expression; an invalid pattern is a DataError."""
    regex = ""
    for i, part in enumerate(parts):
        is_last_part = i == len(parts) - 1
        if part == "**":
            regex += ".*" if is_last_part else "(?:.*/)?"
            continue
        for token in re.findall(r"\[[^]]+\]|.", part):
            if token[0] == "[" and len(token) > 2:
                regex += "[^" + token[2:] if token[1] == "!" else token
            else:
                regex += {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
        regex += "" if is_last_part else "/"
    try:
        return re.compile(regex)
    except re.error as e:
        raise DataError(f"pattern {'/'.join(parts)}", e.msg, "correct it") from e


def _list_local(folder: str, ancestors: frozenset[str] = frozenset()) -> Iterator[ListedFile]:
    """Yield all files below a local folder, following links, since users often link to data elsewhere.

    A broken link has size 0, like a file that has vanished. Links to `ancestors` are not followed: the walk would not
    end.
    """
    real = os.path.realpath(folder)
    if real in ancestors:
        return
    for path in Path(folder).iterdir():
        try:
            info = path.stat()
        except OSError as e:
            # Only the errors of a broken link are ignored. To ignore any other error would leave out text without
            # notice.
            if e.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            yield ListedFile(str(path), 0)
            continue
        if stat.S_ISDIR(info.st_mode):
            yield from _list_local(str(path), ancestors | {real})
        elif stat.S_ISREG(info.st_mode):
            yield ListedFile(str(path), info.st_size)
