"""Check of all files of a prepared folder by their hashes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray.data

from mhmoe_ray.data.shards.cache import plan_cache
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.data.shards.ranges import CHECKS_SUFFIX
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec.cluster import DEFAULT_SHARD_CACHE, ShardCacheSpec
from mhmoe_ray.storage import Location, ObjectPath, file_problem, retry_reads

FILES_PER_TASK = 16
LOCAL_CHECK_BYTES = 1 << 30
"""Largest bytes of shards that one process verifies faster than a cluster."""


def verify_shards(folder: Location, manifest: DataManifest, cache: ShardCacheSpec = DEFAULT_SHARD_CACHE) -> None:
    """Raise DataError if a file of a prepared folder is missing or its content is not what was written.

    On an object store, content is only checked here that is not checked when it arrives.
    """
    expected_hashes = {shard.file: shard.sha256 for shard in manifest.shards}
    if isinstance(folder, ObjectPath):
        existing_files = retry_reads(folder.tree_sizes)
        for file in sorted(expected_hashes.keys() - existing_files.keys()):
            raise DataError(
                f"prepared file {folder / file}", "it is missing", f"restore it, or remove {folder} and prepare again"
            )
        # A shard is checked when it arrives in the cache of a node, and single rows are checked by their CRC32s.
        plan = plan_cache(folder, manifest, cache)
        assert plan is not None
        expected_hashes = {
            file: sha256
            for file, sha256 in expected_hashes.items()
            if not plan.holds_all and f"{file}{CHECKS_SUFFIX}" not in existing_files
        }
    expected_hashes |= {name: sha256 for name, sha256 in manifest.files.items() if sha256 is not None}
    rows = [{"file": file, "sha256": sha256} for file, sha256 in expected_hashes.items()]
    # All files are read, so the whole cluster shares the work if the data have more than `LOCAL_CHECK_BYTES` bytes.
    check = _check_locally if manifest.shard_bytes <= LOCAL_CHECK_BYTES else _check_on_cluster
    for problem in check(rows, folder):
        raise DataError(
            f"prepared file {folder / problem['file']}", problem["reason"], f"remove {folder} and prepare again"
        )


def _check_locally(rows: list[dict[str, Any]], folder: Location) -> Iterator[dict[str, Any]]:
    # Hashing releases the GIL, so threads verify files in parallel.
    with ThreadPoolExecutor() as threads:
        yield from (row for row in threads.map(partial(_check_file, folder=folder), rows) if row["reason"])


def _check_on_cluster(rows: list[dict[str, Any]], folder: Location) -> Iterator[dict[str, Any]]:
    files = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // FILES_PER_TASK))
    files.context.enable_progress_bars = False
    # One problem is enough for the error, so the other files need not be read.
    yield from files.map(partial(_check_file, folder=folder)).filter(lambda row: row["reason"] != "").take(1)


def _check_file(row: dict[str, Any], *, folder: Location) -> dict[str, Any]:
    return {"file": row["file"], "reason": file_problem(folder / row["file"], row["sha256"]) or ""}
