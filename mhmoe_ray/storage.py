"""Files and folders, local or on an object store, with one set of methods; atomic writes; sizes and hashes of files.

A location is a local `pathlib.Path` or an `ObjectPath`, which is a place in one of `STORES` and has the methods of
`pathlib.Path` that a run directory needs. Credentials and regions are found as the vendors' own tools find them; the
query of a URI says how to reach its server. A folder of an object store exists when something is in it.

`replace_file`, `create_file` and `copy_file` write so that a reader sees the old file or the new one, whole, also after
a crash.
"""

import fnmatch
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

from pydantic import BaseModel

from mhmoe_ray.errors import SpecError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs


Store = Callable[[str, str, str], "tuple[fs.FileSystem, str]"]
"""(scheme, bucket, query) -> pyarrow's file system and the bucket's path in it."""


def _from_uri(scheme: str, bucket: str, query: str) -> "tuple[fs.FileSystem, str]":
    """A store that pyarrow knows by its scheme."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(
            f"{scheme}://{bucket}" + (f"?{query}" if query else "")
        )
    except pa.ArrowException as e:
        raise OSError(str(e)) from e
    return found


STORES: dict[str, Store] = {"s3": _from_uri, "gs": _from_uri}
"""Object stores by scheme, for run directories and raw files alike."""


def unknown_scheme(scheme: str) -> tuple[str, str]:
    """Return why a scheme is refused, and what to do."""
    return f"{scheme}:// is not known", f"use a local path, {' or '.join(f'{known}://' for known in STORES)}"


class Status(NamedTuple):
    st_size: int
    st_mtime: float


class ObjectPath:
    """A place on an object store. Equal ones are equal; nothing is asked of the store before a method needs it."""

    def __init__(self, uri: str) -> None:
        """Args:
        uri: scheme://bucket/path?query

        Raises:
            SpecError: the scheme is not known, or there is a password in it.
        """
        refuse_password(uri)
        self._scheme, separator, rest = uri.partition("://")
        if not separator or self._scheme not in STORES:
            raise SpecError(f"path {uri}", *unknown_scheme(self._scheme))
        self._path, _, self._query = rest.partition("?")
        self._path = self._path.strip("/")

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}" + (f"?{self._query}" if self._query else "")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "ObjectPath") -> bool:
        return self._path < other._path

    def __truediv__(self, below: str) -> "ObjectPath":
        return self._at(f"{self._path}/{below}")

    def _at(self, path: str) -> "ObjectPath":
        return ObjectPath(f"{self._scheme}://{path}" + (f"?{self._query}" if self._query else ""))

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        return self._at(self._path.rpartition("/")[0] or self._path)

    def absolute(self) -> "ObjectPath":
        return self

    @property
    def filesystem(self) -> "tuple[fs.FileSystem, str]":
        """pyarrow's, and this place's path in it.

        Raises:
            OSError: it cannot be reached.
        """
        bucket, _, below = self._path.partition("/")
        system, root = object_store(self._scheme, bucket, self._query)
        return system, f"{root}/{below}".rstrip("/")

    def stat(self) -> Status:
        """Raises:
        FileNotFoundError: there is no such object.
        """
        info = self._info()
        if info.type.name != "File":
            raise FileNotFoundError(2, "there is no such object", str(self))
        return Status(info.size, info.mtime_ns / 1e9)

    def _info(self) -> Any:
        system, path = self.filesystem
        return system.get_file_info(path)

    def exists(self) -> bool:
        return bool(self._info().type.name != "NotFound")

    def is_file(self) -> bool:
        return bool(self._info().type.name == "File")

    def read_bytes(self) -> bytes:
        """Raises:
        FileNotFoundError: there is no such object.
        """
        system, path = self.filesystem
        with system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def open(self, mode: str = "rb", buffering: int = -1) -> "pa.NativeFile":
        """To read at any place ("rb"), or a new object to write ("xb"), which is there when it is closed.

        Raises:
            FileNotFoundError: there is no such object to read.
            FileExistsError: there is one where a new one was to be.
        """
        system, path = self.filesystem
        if mode == "rb":
            return system.open_input_file(path)
        assert mode == "xb"
        if self.exists():
            raise FileExistsError(17, "it is there already", str(self))
        return system.open_output_stream(path, compression=None)

    def write_bytes(self, data: "bytes | memoryview") -> None:
        """In one step, in place of what was there."""
        system, path = self.filesystem
        with system.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    def touch(self) -> None:
        self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there when something is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        system, path = self.filesystem
        try:
            system.delete_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        system, path = self.filesystem
        system.delete_dir(path)

    def iterdir(self) -> "Iterator[ObjectPath]":
        """In the order of their names."""
        for info in self._below():
            yield self / info.base_name

    def sizes(self) -> "Iterator[tuple[ObjectPath, int]]":
        """Objects in the order of their names, and their bytes."""
        for info in self._below():
            if info.type.name == "File":
                yield self / info.base_name, info.size

    def _below(self) -> "list[Any]":
        from pyarrow import fs

        system, path = self.filesystem
        return sorted(system.get_file_info(fs.FileSelector(path, allow_not_found=True)), key=lambda i: i.path)

    def glob(self, pattern: str) -> "Iterator[ObjectPath]":
        """Args:
        pattern: of names, one for each level.
        """
        first, _, rest = pattern.partition("/")
        plain = not any(c in first for c in "*?[")
        found = [self / first] if plain else [p for p in self.iterdir() if fnmatch.fnmatchcase(p.name, first)]
        for place in found:
            if rest:
                yield from place.glob(rest)
            elif not plain or place.exists():
                yield place


Location: TypeAlias = Path | ObjectPath


def refuse_password(uri: str) -> None:
    """A name alone may stand before the bucket's: gs://anonymous@bucket.

    Raises:
        SpecError: there is a password beside it, which would be seen in specs, logs and metadata of jobs.
    """
    scheme, separator, rest = uri.partition("://")
    user, at, host = rest.partition("/")[0].rpartition("@")
    if separator and at and ":" in user:
        why = "it holds a password, which others would see in specs and logs"
        raise SpecError(f"path {scheme}://...@{host}", why, "leave it to the environment, or to the vendor's own files")


def location(text: "str | Location") -> Location:
    """Raises:
    SpecError: a scheme that is not known, or a password in it.
    """
    if isinstance(text, Path | ObjectPath):
        return text
    return ObjectPath(text) if "://" in text else Path(text)


@lru_cache(maxsize=64)
def object_store(scheme: str, bucket: str, query: str) -> "tuple[fs.FileSystem, str]":
    """pyarrow's file system of a bucket, and the bucket's path in it; kept within a process, since finding out a
    bucket's region takes a request.

    Raises:
        OSError: it cannot be reached, or the query is not one of pyarrow's.
    """
    return STORES[scheme](scheme, bucket, query)


def replace_file(path: Location, data: bytes | memoryview) -> None:
    """Write a file in one step, its folder too where that is missing. Several may write at the same time."""
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Location, value: dict[str, Any]) -> None:
    replace_file(path, json.dumps(value, indent=1).encode())


@contextmanager
def create_file(path: Location) -> Iterator[BinaryIO]:
    """A new file to write, its folder made too; on the disk when the context ends.

    Raises:
        FileExistsError: it is there already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb", buffering=0) as f:
        yield f
        if not isinstance(path, ObjectPath):
            os.fsync(f.fileno())


def copy_file(source: Location, to: Location) -> None:
    """A small one, in one step."""
    replace_file(to, source.read_bytes())


def remove_tree(folder: Location) -> None:
    """A folder and all in it."""
    if isinstance(folder, ObjectPath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder)


_BLOCK_BYTES = 16 << 20  # on an object store each is a request
_READERS = 8  # files that are read at a time: storage that many nodes share is faster so


class FileEntry(BaseModel):
    size: int
    sha256: str


def describe_file(path: Location) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_BLOCK_BYTES):
            digest.update(block)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def describe_files(paths: Sequence[Location]) -> Iterable[FileEntry]:
    """Of each, in order."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(describe_file, paths)


Describe = Callable[[Sequence[Location]], Iterable[FileEntry]]
