"""Files and folders at a location: atomic writes, reads, sizes and hashes.

`replace_file` and `copy_file` are atomic: a reader sees the complete old or the complete new file, even after a crash.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from mhmoe_ray.errors import StorageError
from mhmoe_ray.storage.location import Location, ObjectPath, explain_error

_PARTIAL_SUFFIX = ".partial"


@contextmanager
def report_write_errors(path: Location, next_step: str = "give the command again") -> Iterator[None]:
    """Context manager that turns an OSError into a StorageError about writing or removing `path`."""
    try:
        yield
    except OSError as e:
        reason, fix = explain_error(e, f"make room or repair the storage, then {next_step}")
        raise StorageError(f"storage {path}", f"it cannot be written: {reason}", fix) from e


def make_folder(folder: Location) -> None:
    """Create a folder and its missing parents, so that they survive a crash of the machine."""
    if isinstance(folder, ObjectPath):
        return
    missing_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing_folders:
        sync(path.parent)


def sync(path: Location) -> None:
    """Wait until the content of a file, or the names of a folder's files, are on the disk."""
    if isinstance(path, ObjectPath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        # Some file systems of networks cannot sync folders; they keep names on their servers.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def replace_file(path: Location, data: bytes | memoryview, *, is_new: bool = False) -> None:
    """Write a file atomically and durably, creating its folder; several processes may write it at the same time.

    With `is_new`, an existing file is a FileExistsError. On an object store or a file system without hard links, files
    that are written at the same moment may still replace each other.
    """
    if is_new and path.exists():
        raise FileExistsError(errno.EEXIST, "it is there already", str(path))
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        try:
            if is_new:
                path.hardlink_to(partial)
        except FileExistsError:
            raise
        except OSError:
            # The file system has no hard links.
            is_new = False
        if not is_new:
            partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Location) -> None:
    """Remove the temporary files that processes left below a folder when they were killed within `replace_file`.

    No other process may be writing to the folder, because its temporary files would be removed as well.
    """
    # An object store has no partial files: an object appears when it is complete.
    if isinstance(folder, Path):
        for partial in folder.rglob(f".*{_PARTIAL_SUFFIX}"):
            partial.unlink(missing_ok=True)


def write_json(path: Location, value: dict[str, Any], *, is_new: bool = False) -> None:
    """Write a dictionary as a JSON file, as `replace_file` does."""
    replace_file(path, json.dumps(value, indent=1).encode(), is_new=is_new)


@contextmanager
def create_file(path: Location) -> Iterator[BinaryIO]:
    """Open a new file for writing and create its folder; an existing file is a FileExistsError.

    When the context ends, the data is on the disk or in the object store.
    """
    make_folder(path.parent)
    # The file is buffered, because an unbuffered write to a disk that becomes full may write less without an error.
    with path.open("xb") as f:
        yield f
        if not isinstance(path, ObjectPath):
            f.flush()
            os.fsync(f.fileno())
            sync(path.parent)


def read_file(path: Location) -> bytes:
    """Return the content of a file. A folder, pipe or device is an OSError, because reading a pipe may never end."""
    if isinstance(path, Path) and not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path.read_bytes()


def is_special(path: Location) -> bool:
    """Return whether a path is there but is no regular file: a local folder, pipe, device or loop of links."""
    return isinstance(path, Path) and os.path.lexists(path) and not path.is_file()


def copy_file(source: Location, target: Location) -> None:
    """Copy a small file atomically, through memory."""
    replace_file(target, source.read_bytes())


def remove_tree(folder: Location, *, ignore_errors: bool = False) -> None:
    """Delete a folder with everything in it."""
    with suppress(OSError) if ignore_errors else nullcontext():
        if isinstance(folder, ObjectPath):
            folder.remove_tree()
        else:
            shutil.rmtree(folder, ignore_errors)


# Number of bytes of each read. Reads are large, because on an object store each read is a request.
_BLOCK_BYTES = 16 << 20
# Number of files that are read at the same time, because storage that many nodes share is faster with parallel reads.
_READERS = 8


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of a file, as a manifest lists them."""

    size: int
    sha256: str


def describe_file(path: Location) -> FileEntry:
    """Return the size and hash of a file; a folder, pipe or device is an OSError."""
    if is_special(path):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_BLOCK_BYTES):
            digest.update(block)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def file_problem(path: Location, sha256: str) -> str | None:
    """Return the reason why a file does not have this SHA-256, or None."""
    if not path.is_file():
        return "it is missing"
    return None if describe_file(path).sha256 == sha256 else "its content is not what was written"


def describe_files(paths: Sequence[Location]) -> Iterable[FileEntry]:
    """Yield the size and hash of each file, in the order of `paths`, reading several files at the same time."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(describe_file, paths)


Describe = Callable[[Sequence[Location]], Iterable[FileEntry]]
"""Function like `describe_files`."""
