"""Whether prepared shards are what was written."""

from functools import partial
from pathlib import Path
from typing import Any

import ray.data

from mhmoe_ray.data.shards.manifest import DataManifest, Shard
from mhmoe_ray.errors import DataError
from mhmoe_ray.runs.manifest import describe_file

SHARDS_PER_TASK = 16


def verify_shards(folder: Path, manifest: DataManifest) -> None:
    """Every shard is there with the content it was written with; checked by all of the cluster, since it reads all.

    Raises:
        DataError: one is missing or damaged.
    """
    rows = [vars(s) for d in manifest.domains.values() for s in d.shards] + [vars(s) for s in manifest.validation]
    shards = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // SHARDS_PER_TASK))
    shards.context.enable_progress_bars = False
    problems = shards.map(partial(_check, folder=folder)).filter(lambda row: row["why"] != "")
    for problem in problems.take(1):
        raise DataError(f"shard {folder / problem['file']}", problem["why"], f"remove {folder} and prepare again")


def _check(row: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    shard = Shard.model_validate(row)
    path, why = folder / shard.file, ""
    if not path.is_file():
        why = "it is missing"
    elif describe_file(path).sha256 != shard.sha256:
        why = "its content is not what was written"
    return {"file": shard.file, "why": why}
