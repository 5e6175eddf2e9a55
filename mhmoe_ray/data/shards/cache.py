"""The cache of a node for shards on an object store: whole files, named by their SHA-256, shared by all processes.

    <cluster.shard_cache.path>/
      lock              held while room is made for a shard
      <sha256>.partial  a shard that is being fetched; the process that fetches it holds a lock on it
      <sha256>.arrow    a fetched shard; each process that has it open holds a shared lock on it

Room for a shard is reserved before it is fetched, so the files never have more bytes than
`cluster.shard_cache.size_gb` allows. The cache trusts and removes what is in its folder, so it refuses a folder with
other files, and that of another user.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec.cluster import ShardCacheSpec
from mhmoe_ray.storage import Location, ObjectPath, retry_reads

LOCK_FILE = "lock"
_FILE_NAME = re.compile(rf"{LOCK_FILE}|[0-9a-f]{{64}}\.(partial|arrow)")
FETCH_BYTES = 8 << 20
WAIT_SECONDS = 0.05
"""Pause between two checks whether another process has fetched a shard."""
ATTEMPTS = 3
"""Number of times that content with a wrong hash is fetched."""


class CachePlan(NamedTuple):
    """The part of a prepared folder that processes may keep on their node."""

    path: Path
    limit: int
    """Largest bytes of all files."""
    holds_all: bool
    """Whether all shards of the folder fit; otherwise only single rows are read, and nothing is kept."""


def plan_cache(folder: Location, manifest: DataManifest, cache: ShardCacheSpec) -> CachePlan | None:
    """Return the plan for a prepared folder; None for a local one, which needs no cache."""
    if not isinstance(folder, ObjectPath):
        return None
    limit = int(cache.size_gb * 1e9)
    path = cache.path or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhmoe" / "shards"
    return CachePlan(path, limit, manifest.shard_bytes <= limit)


def damage_error(source: Location) -> DataError:
    """Return the error of an object whose content is not what the preparation wrote."""
    fix = "restore it, or remove the folder and prepare again"
    return DataError(f"prepared file {source}", "it was replaced or damaged: its content is not what was written", fix)


class ShardCache:
    """The files of a node's cache."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        other_names = (file.name for file in path.iterdir() if not _FILE_NAME.fullmatch(file.name))
        reason = None
        if path.stat().st_uid != os.geteuid():
            reason = "the folder belongs to another user, whose files would be taken for shards"
        elif other_name := next(other_names, None):
            reason = f"the folder holds {other_name}, which is no shard, and the cache removes files to make room"
        if reason is not None:
            raise DataError(f"shard cache {path}", reason, "set cluster.shard_cache.path to a folder of its own")

    def open(self, source: ObjectPath, sha256: str) -> BinaryIO | None:
        """Open a shard, and fetch it if it is missing; it stays in the cache until the file and its copies are closed.

        The result is None if there is no room for it. Content with another hash is a DataError.
        """
        target = self._path / f"{sha256}.arrow"
        while (file := _open_locked(target)) is None:
            if not self._fetch(source, sha256, target):
                return None
        os.utime(target)
        return file

    def _fetch(self, source: ObjectPath, sha256: str, target: Path) -> bool:
        """Fetch a shard unless another process does; return whether there was room."""
        partial = target.with_suffix(".partial")
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as out:
            while not _try_lock(out):
                if target.exists():
                    return True
                time.sleep(WAIT_SECONDS)
            # Another process may have fetched the shard, or given up, while this one waited.
            if not partial.exists() or not os.path.samestat(partial.stat(), os.fstat(out.fileno())):
                return True
            try:
                size = retry_reads(source.stat).st_size
                if not self._reserve(out, size):
                    return False
                for _ in range(ATTEMPTS):
                    if retry_reads(lambda: _copy(source, out, size)) == sha256:
                        partial.rename(target)
                        return True
                raise damage_error(source)
            finally:
                partial.unlink(missing_ok=True)

    def _reserve(self, out: BinaryIO, size: int) -> bool:
        """Give a partial file its full size, after removing shards that no process has open; return False without room.

        The least recently opened shards are removed first.
        """
        with self._lock():
            # A process that was killed may have left bytes in the file.
            os.truncate(out.fileno(), 0)
            files = sorted((path for path in self._path.iterdir() if path.is_file()), key=lambda p: p.stat().st_mtime)
            used_bytes = sum(path.stat().st_size for path in files)
            for path in files:
                if used_bytes + size <= self._limit:
                    break
                if path.name != LOCK_FILE:
                    used_bytes -= _remove_unless_open(path)
            if used_bytes + size > self._limit:
                return False
            try:
                os.posix_fallocate(out.fileno(), 0, max(1, size))
            except OSError as e:
                print(f"warning: the cache {self._path} cannot grow ({e.strerror}), so rows are read one by one")
                return False
            return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self._path / LOCK_FILE).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _open_locked(path: Path) -> BinaryIO | None:
    """Open a file of the cache with a shared lock; None if it is not there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
        return file
    file.close()
    return None


def _try_lock(file: BinaryIO) -> bool:
    """Take the exclusive lock on a file, unless any process has a lock on it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unless_open(path: Path) -> int:
    """Remove a file of the cache that no process has open, and return its size; return 0 for any other."""
    with path.open("rb") as file:
        if not _try_lock(file):
            return 0
        path.unlink()
        return os.fstat(file.fileno()).st_size


def _copy(source: ObjectPath, out: BinaryIO, size: int) -> str:
    """Write the content of an object to a file with room for `size` bytes, and return its SHA-256."""
    digest = hashlib.sha256()
    system, path = source.filesystem
    position = 0
    with system.open_input_stream(path, compression=None) as stream:
        while position < size and (block := stream.read(min(FETCH_BYTES, size - position))):
            digest.update(block)
            os.pwrite(out.fileno(), block, position)
            position += len(block)
    return digest.hexdigest()
