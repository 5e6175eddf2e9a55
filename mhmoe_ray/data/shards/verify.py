"""Check of all files of a prepared folder by their hashes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray.data

from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import file_problem

FILES_PER_TASK = 16
LOCAL_CHECK_BYTES = 1 << 30
"""Largest bytes of shards that one process verifies faster than a cluster."""


def verify_shards(folder: Path, manifest: DataManifest) -> None:
    """Raise DataError if a file of a prepared folder is missing or its content is not what was written."""
    # All files are read, so the whole cluster shares the work if the data have more than `LOCAL_CHECK_BYTES` bytes.
    shards = [*(s for d in manifest.domains.values() for s in d.shards), *manifest.validation]
    expected_hashes = {s.file: s.sha256 for s in shards}
    expected_hashes |= {name: sha256 for name, sha256 in manifest.files.items() if sha256 is not None}
    rows = [{"file": file, "sha256": sha256} for file, sha256 in expected_hashes.items()]
    total_bytes = sum(s.rows for s in shards) * manifest.seq_len * manifest.token_bytes
    total_bytes += sum(d.image_bytes or 0 for d in manifest.domains.values())
    for problem in (_check_locally if total_bytes <= LOCAL_CHECK_BYTES else _check_on_cluster)(rows, folder):
        raise DataError(
            f"prepared file {folder / problem['file']}", problem["reason"], f"remove {folder} and prepare again"
        )


def _check_locally(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    # Hashing releases the GIL, so threads verify files in parallel.
    with ThreadPoolExecutor() as threads:
        yield from (row for row in threads.map(partial(_check_file, folder=folder), rows) if row["reason"])


def _check_on_cluster(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    files = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // FILES_PER_TASK))
    files.context.enable_progress_bars = False
    # One problem is enough for the error, so the other files need not be read.
    yield from files.map(partial(_check_file, folder=folder)).filter(lambda row: row["reason"] != "").take(1)


def _check_file(row: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    return {"file": row["file"], "reason": file_problem(folder / row["file"], row["sha256"]) or ""}
