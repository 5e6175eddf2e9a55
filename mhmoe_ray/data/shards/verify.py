"""Whether prepared shards are what was written."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray.data

from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import describe_file

FILES_PER_TASK = 16
LITTLE = 1 << 30
"""Bytes that one process reads sooner than Ray starts others."""


def verify_shards(folder: Path, manifest: DataManifest) -> None:
    """Every shard and the tokenizer are there with the content they were written with; checked by all of the cluster
    if it is much, since all of it is read.

    Raises:
        DataError: one is missing or damaged.
    """
    shards = [*(s for d in manifest.domains.values() for s in d.shards), *manifest.validation]
    written = {"tokenizer.json": manifest.tokenizer_sha256} | {s.file: s.sha256 for s in shards}
    rows = [{"file": file, "sha256": sha256} for file, sha256 in written.items()]
    size = sum(s.rows for s in shards) * manifest.seq_len * manifest.token_bytes
    for problem in (_check_here if size <= LITTLE else _check_everywhere)(rows, folder):
        raise DataError(
            f"prepared file {folder / problem['file']}", problem["why"], f"remove {folder} and prepare again"
        )


def _check_here(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor() as threads:
        yield from (row for row in threads.map(partial(_check, folder=folder), rows) if row["why"])


def _check_everywhere(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    files = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // FILES_PER_TASK))
    files.context.enable_progress_bars = False
    yield from files.map(partial(_check, folder=folder)).filter(lambda row: row["why"] != "").take(1)


def _check(row: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    return {"file": row["file"], "why": problem_with(folder / row["file"], row["sha256"]) or ""}


def problem_with(path: Path, sha256: str) -> str | None:
    """Why a file is not what was written; None if it is."""
    if not path.is_file():
        return "it is missing"
    return None if describe_file(path).sha256 == sha256 else "its content is not what was written"
