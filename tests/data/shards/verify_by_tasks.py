"""Report in one line whether a prepared folder is sound, also with the tasks that check large folders."""

from pathlib import Path

from mhmoe_ray.data.shards import files
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.errors import DataError


def problem_of(folder: Path) -> str:
    """Return the first problem of a prepared folder, or that it is sound."""
    manifest = read_data_manifest(folder)
    assert manifest is not None
    try:
        files.verify_shards(folder, manifest)
    except DataError as e:
        return str(e)
    return "sound"


def problem_by_tasks(folder: Path) -> str:
    """Return the same as `problem_of`, found by tasks of a running Ray.

    Later checks of this process use tasks too, since every folder then counts as large.
    """
    files.LITTLE = 0
    return problem_of(folder)
