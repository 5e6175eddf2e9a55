"""Locations: local paths and objects of a store, with one set of methods.

A location is a `pathlib.Path` or an `ObjectPath`, which has the methods of `pathlib.Path` that a run directory needs.
Credentials and regions are found as the vendors' own tools find them; the query of a URI may set the server and other
parameters of the connection. A folder of an object store exists when it holds an object.
"""

import errno
import fnmatch
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from mhmoe_ray.errors import SpecError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs


STORE_CONNECTIONS = 128
"""Largest number of connections of a process to a store. Each read takes a round trip, so small reads need many."""

Store = Callable[[str, str, str], "tuple[fs.FileSystem, str]"]
"""Function (URI scheme, bucket, query of the URI) -> (pyarrow's file system, path of the bucket in it)."""


def _from_uri(scheme: str, bucket: str, query: str) -> "tuple[fs.FileSystem, str]":
    import pyarrow as pa
    from pyarrow import fs

    # A client for S3 has as many connections as Arrow has threads for reads when the client is made.
    pa.set_io_thread_count(STORE_CONNECTIONS)
    try:
        filesystem_and_path: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(
            f"{scheme}://{bucket}" + (f"?{query}" if query else "")
        )
    except pa.ArrowException as e:
        raise OSError(str(e)) from e
    return filesystem_and_path


STORES: dict[str, Store] = {"s3": _from_uri, "gs": _from_uri}
"""Functions that open a bucket, by URI scheme; run directories and raw training data can be on these stores."""


def unknown_scheme(scheme: str) -> tuple[str, str]:
    """Return the reason and the fix of an error about a URI whose scheme is not in `STORES`."""
    return f"{scheme}:// is not known", f"use a local path, {' or '.join(f'{name}://' for name in STORES)}"


class Status(NamedTuple):
    """Size in bytes and modification time of an object, under the names of `os.stat_result`."""

    st_size: int
    st_mtime: float


class ObjectPath:
    """Path `scheme://bucket/path?query` on an object store; an unknown scheme or a password is a SpecError.

    Paths are compared by their URIs, and only methods that need the store contact it. As with `pathlib.Path`, a missing
    object is a FileNotFoundError.
    """

    def __init__(self, uri: str) -> None:
        refuse_password(uri)
        self._scheme, separator, path_and_query = uri.partition("://")
        if not separator or self._scheme not in STORES:
            raise SpecError(f"path {uri}", *unknown_scheme(self._scheme))
        self._path, _, self._query = path_and_query.partition("?")
        self._path = self._path.strip("/")

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}" + (f"?{self._query}" if self._query else "")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, right: object) -> bool:
        return isinstance(right, ObjectPath) and str(self) == str(right)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, right: "ObjectPath") -> bool:
        return self._path < right._path

    def __truediv__(self, relative_path: str) -> "ObjectPath":
        return self._with_path(f"{self._path}/{relative_path}")

    def _with_path(self, path: str) -> "ObjectPath":
        return ObjectPath(f"{self._scheme}://{path}" + (f"?{self._query}" if self._query else ""))

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    def with_name(self, name: str) -> "ObjectPath":
        return self.parent / name

    def with_suffix(self, suffix: str) -> "ObjectPath":
        stem, dot, _ = self.name.rpartition(".")
        return self.with_name((stem if dot else self.name) + suffix)

    @property
    def parent(self) -> "ObjectPath":
        return self._with_path(self._path.rpartition("/")[0] or self._path)

    def absolute(self) -> "ObjectPath":
        return self

    @property
    def filesystem(self) -> "tuple[fs.FileSystem, str]":
        """pyarrow's file system of the bucket and this object's path in it; OSError if the store is out of reach."""
        bucket, _, key = self._path.partition("/")
        system, root = object_store(self._scheme, bucket, self._query)
        return system, f"{root}/{key}".rstrip("/")

    def stat(self) -> Status:
        info = self._info()
        if info.type.name != "File":
            raise FileNotFoundError(2, "there is no such object", str(self))
        return Status(info.size, info.mtime_ns / 1e9)

    def _info(self) -> Any:
        system, path = self.filesystem
        with refusal_reasons(system, path):
            return system.get_file_info(path)

    def exists(self) -> bool:
        return bool(self._info().type.name != "NotFound")

    def require_bucket(self) -> None:
        """Raise an OSError if the bucket does not exist, or cannot be listed."""
        bucket = self._with_path(self._path.partition("/")[0])
        if not bucket.exists():
            raise OSError(errno.ENXIO, "NO_SUCH_BUCKET", str(bucket))

    def is_file(self) -> bool:
        return bool(self._info().type.name == "File")

    def read_bytes(self) -> bytes:
        """Return the contents of the object without decompressing them."""
        system, path = self.filesystem
        with refusal_reasons(system, path), system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb", buffering: int = -1) -> "pa.NativeFile":
        """Open for random access ("rb"), or write a new object, which appears when it is closed ("xb")."""
        system, path = self.filesystem
        if mode == "rb":
            with refusal_reasons(system, path):
                return system.open_input_file(path)
        assert mode == "xb"
        if self.exists():
            raise FileExistsError(17, "it is there already", str(self))
        return system.open_output_stream(path, compression=None)

    def write_bytes(self, data: "bytes | memoryview") -> None:
        """Write the object in one step, replacing an existing one."""
        system, path = self.filesystem
        with system.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    def touch(self) -> None:
        self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing, as a folder of an object store exists when it holds an object."""

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
        """Yield the paths directly below this one, sorted by name."""
        for info in self._child_infos():
            yield self / info.base_name

    def sizes(self) -> "Iterator[tuple[ObjectPath, int]]":
        """Yield the objects directly below this path, sorted by name, each with its size in bytes."""
        for info in self._child_infos():
            if info.type.name == "File":
                yield self / info.base_name, info.size

    def tree_sizes(self) -> dict[str, int]:
        """Return the size of each object below this path, by its path relative to this one."""
        from pyarrow import fs

        system, path = self.filesystem
        infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
        return {info.path.removeprefix(f"{path}/"): info.size for info in infos if info.type.name == "File"}

    def copy_to(self, target: "ObjectPath") -> None:
        """Copy the object within its store, which moves no bytes through this machine."""
        system, path = self.filesystem
        system.copy_file(path, target.filesystem[1])

    def _child_infos(self) -> "list[Any]":
        from pyarrow import fs

        system, path = self.filesystem
        return sorted(system.get_file_info(fs.FileSelector(path, allow_not_found=True)), key=lambda i: i.path)

    def glob(self, pattern: str) -> "Iterator[ObjectPath]":
        """Yield the existing paths below this one that match a pattern of names separated by "/"."""
        head_pattern, _, tail_pattern = pattern.partition("/")
        plain = not any(c in head_pattern for c in "*?[")
        children = [self / head_pattern] if plain else list(self.iterdir())
        candidates = children if plain else [p for p in children if fnmatch.fnmatchcase(p.name, head_pattern)]
        for candidate in candidates:
            if tail_pattern:
                yield from candidate.glob(tail_pattern)
            elif not plain or candidate.exists():
                yield candidate


Location: TypeAlias = Path | ObjectPath


def matching_paths(folder: Location, name_pattern: str) -> list[Location]:
    """Return the paths in a folder whose names match; none if it is missing, but an OSError if it cannot be read."""
    # `Path.glob` finds nothing in an unreadable folder since Python 3.13.
    try:
        return [path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, name_pattern)]
    except FileNotFoundError:
        return []


def default_storage() -> str:
    """Return the folder of run directories that is used where neither a command nor a spec names one: MHMOE_STORAGE,
    else `runs`."""
    return os.environ.get("MHMOE_STORAGE") or "runs"


def refuse_password(uri: str) -> None:
    """Raise a SpecError if a URI holds a password, which specs, logs and the metadata of jobs would show.

    A user name alone is allowed before the bucket's name: gs://anonymous@bucket.
    """
    scheme, separator, host_and_path = uri.partition("://")
    user, at_sign, host = host_and_path.partition("/")[0].rpartition("@")
    if separator and at_sign and ":" in user:
        reason = "it holds a password, which others would see in specs and logs"
        fix = "leave it to the environment, or to the vendor's own files"
        raise SpecError(f"path {scheme}://...@{host}", reason, fix)


def location(text: "str | Location") -> Location:
    """Return an `ObjectPath` for a URI, else a local `Path`; an unknown scheme or a password is a SpecError."""
    if isinstance(text, Path | ObjectPath):
        return text
    return ObjectPath(text) if "://" in text else Path(text)


def resolve_path(base: Path, path: Location) -> Location:
    """Return a local path relative to `base` as an absolute path, and an object path unchanged."""
    return base / path if isinstance(path, Path) else path


@lru_cache(maxsize=64)
def object_store(scheme: str, bucket: str, query: str) -> "tuple[fs.FileSystem, str]":
    """Return pyarrow's file system of a bucket, and the bucket's path in it.

    The result is cached, since finding out a bucket's region takes a request. An OSError means that the store cannot be
    reached, or that pyarrow does not know a key of the query.
    """
    return STORES[scheme](scheme, bucket, query)


READ_PATIENCE_SECONDS = 300.0
"""Seconds for which reads from an object store are repeated."""
_REGIONS = re.compile("configured region is '(.*?)' while the bucket is located in '(.*?)'")
_REGION_FIX = "write its region in the URI (?region=...), or leave the region out"
_CREDENTIALS_FIX = "set the credentials of the store in the environment, or in the vendor's files, of all nodes"
_PERMISSION_FIX = "let the owner of the bucket permit it, or use credentials of an account that may"
_REFUSALS = {
    "ExpiredToken": ("the token of the credentials has expired", "get a new one, then give the command again"),
    "InvalidToken": ("the store does not accept the token of the credentials", _CREDENTIALS_FIX),
    "INVALID_ACCESS_KEY": ("the store does not know the access key", _CREDENTIALS_FIX),
    "SIGNATURE_DOES_NOT_MATCH": ("the secret key does not belong to the access key", _CREDENTIALS_FIX),
    "PermanentRedirect": ("the bucket is in another region", _REGION_FIX),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", _REGION_FIX),
    "REQUEST_TIME_TOO_SKEWED": ("the clock of this machine differs from the store's", "set the clock"),
    "NO_SUCH_BUCKET": ("there is no such bucket", "create it, or correct its name"),
    "ACCESS_DENIED": ("the store does not permit it to these credentials", _PERMISSION_FIX),
    "UNAUTHENTICATED": ("the store does not accept the credentials", _CREDENTIALS_FIX),
    "PERMISSION_DENIED": ("the store does not permit it to these credentials", _PERMISSION_FIX),
}
"""Reason and fix of errors that a repetition does not mend, by their name in the messages of S3 and Google's store."""


@contextmanager
def refusal_reasons(system: "fs.FileSystem", path: str) -> Iterator[None]:
    """Context for a request to a store about `path`, whose errors have the reason of a refusal, if there is one."""
    try:
        yield
    except OSError as e:
        # The answer to S3's request for a header has no body. The one to a listing has the reason.
        if "No response body" in str(e) and not _REGIONS.search(str(e)):
            from pyarrow import fs

            system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        raise


def short_message(error: Exception) -> str:
    """Return the message of an error of pyarrow in one line, without the part that begins with "Detail:"."""
    return " ".join(str(error).split(". Detail:")[0].split())


def explain_error(error: OSError, fix: str) -> tuple[str, str]:
    """Return the reason of an error in one line, and what to do: `fix`, unless a store said why it refuses."""
    text = short_message(error)
    if match := _REGIONS.search(text):
        own_region, region = match.groups()
        return f"the bucket is in region {region}, not {own_region}", _REGION_FIX
    known_refusals = (refusal for name, refusal in _REFUSALS.items() if name in text)
    return next(known_refusals, (error.strerror or text, fix))


T = TypeVar("T")


def retry_reads(read: Callable[[], T]) -> T:
    """Return the result of reading from an object store; repeat errors that may pass for `READ_PATIENCE_SECONDS`."""
    deadline, pause = time.monotonic() + READ_PATIENCE_SECONDS, 0.2
    while True:
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as e:
            if time.monotonic() > deadline or any(name in str(e) for name in _REFUSALS):
                raise
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def read_range(path: Location, offset: int, length: int) -> bytes:
    """Return up to `length` bytes of a file from `offset` on, fewer at the end of the file."""
    with path.open("rb") as f:
        f.seek(offset)
        return bytes(f.read(length))
