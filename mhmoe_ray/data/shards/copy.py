"""Copies of prepared folders, from or to an object store: each file is checked, and the manifest is written last."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa

from mhmoe_ray.data.shards.documents import index_file
from mhmoe_ray.data.shards.files import byte_columns, has_fixed_rows
from mhmoe_ray.data.shards.manifest import MANIFEST_FILE, QUARANTINE_FILE, DataManifest, require_data_manifest
from mhmoe_ray.data.shards.ranges import checks_file, write_checks
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import (
    Location,
    ObjectPath,
    file_problem,
    read_file,
    replace_file,
    report_write_errors,
    retry_reads,
)

COPIERS = 4
"""Number of files that are copied at the same time; each is in memory."""


class CopyProgress(NamedTuple):
    """Progress of a copy."""

    files: int
    """Number of files that are in the target."""
    total: int
    copied_bytes: int
    """Bytes that this copy has written."""


def copy_folder(source: Location, target: Location) -> Iterator[CopyProgress]:
    """Copy a prepared folder, and yield the progress after each file.

    Files that are in the target already are read and kept if they have the right hash. A target with another manifest,
    or a damaged file of the source, is a DataError.
    """
    manifest, content = require_data_manifest(source), read_file(source / MANIFEST_FILE)
    is_complete = (target / MANIFEST_FILE).exists()
    if is_complete and read_file(target / MANIFEST_FILE) != content:
        raise DataError(f"prepared data {target}", "it is another data set", "name another folder, or remove this one")
    hashes = _file_hashes(manifest)
    copied_bytes = 0
    with ThreadPoolExecutor(COPIERS) as threads, report_write_errors(target):
        sizes = threads.map(
            lambda file: _copy_file(source, target, file, hashes[file]) + _copy_index(source / file, target / file),
            hashes,
        )
        for number, size in enumerate(sizes, 1):
            copied_bytes += size
            yield CopyProgress(number, len(hashes) + 1, copied_bytes)
        if is_complete:
            content = b""
        elif (source / QUARANTINE_FILE).exists():
            replace_file(target / QUARANTINE_FILE, read_file(source / QUARANTINE_FILE))
        if content:
            replace_file(target / MANIFEST_FILE, content)
    yield CopyProgress(len(hashes) + 1, len(hashes) + 1, copied_bytes + len(content))


def _file_hashes(manifest: DataManifest) -> dict[str, str]:
    files = {name: sha256 for name, sha256 in manifest.files.items() if sha256 is not None}
    return files | {shard.file: shard.sha256 for shard in manifest.shards}


def _copy_file(source: Location, target: Location, file: str, sha256: str) -> int:
    """Copy a file unless the target has it; return the bytes that were written."""
    is_there = file_problem(target / file, sha256) is None
    needs_checks = (
        isinstance(target, ObjectPath) and file.endswith(".arrow") and not checks_file(target / file).exists()
    )
    if is_there and not needs_checks:
        return 0
    content = retry_reads(lambda: read_file(source / file))
    if hashlib.sha256(content).hexdigest() != sha256:
        fix = "restore it, or prepare the data again"
        raise DataError(f"prepared file {source / file}", "its content is not what was written", fix)
    if not is_there:
        replace_file(target / file, content)
    if needs_checks:
        batch = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
        if has_fixed_rows(batch):
            write_checks(target / file, byte_columns(batch))
    return 0 if is_there else len(content)


def _copy_index(source: Location, target: Location) -> int:
    """Copy the index of a shard's documents, if there is one and the target has none; return the bytes written."""
    if index_file(target).exists() or not index_file(source).exists():
        return 0
    content = retry_reads(lambda: read_file(index_file(source)))
    replace_file(index_file(target), content)
    return len(content)
