"""Whether prepared shards are what was written."""

from functools import partial
from pathlib import Path
from typing import Any

import ray.data

from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.errors import DataError
from mhmoe_ray.runs.manifest import describe_file

FILES_PER_TASK = 16


def verify_shards(folder: Path, manifest: DataManifest) -> None:
    """Every shard and the tokenizer are there with the content they were written with; checked by all of the cluster,
    since it reads all.

    Raises:
        DataError: one is missing or damaged.
    """
    shards = [*(s for d in manifest.domains.values() for s in d.shards), *manifest.validation]
    written = {"tokenizer.json": manifest.tokenizer_sha256} | {s.file: s.sha256 for s in shards}
    rows = [{"file": file, "sha256": sha256} for file, sha256 in written.items()]
    files = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // FILES_PER_TASK))
    files.context.enable_progress_bars = False
    problems = files.map(partial(_check, folder=folder)).filter(lambda row: row["why"] != "")
    for problem in problems.take(1):
        raise DataError(
            f"prepared file {folder / problem['file']}", problem["why"], f"remove {folder} and prepare again"
        )


def _check(row: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    return {"file": row["file"], "why": problem_with(folder / row["file"], row["sha256"]) or ""}


def problem_with(path: Path, sha256: str) -> str | None:
    """Why a file is not what was written; None if it is."""
    if not path.is_file():
        return "it is missing"
    return None if describe_file(path).sha256 == sha256 else "its content is not what was written"
