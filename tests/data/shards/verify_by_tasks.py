"""Whether a prepared folder is sound, in a line; also found out as if there were much in it."""

from pathlib import Path

from mhmoe_ray.data.shards import files
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.errors import DataError


def problem_of(folder: Path) -> str:
    """Of a prepared folder, or that it is sound."""
    manifest = read_data_manifest(folder)
    assert manifest is not None
    try:
        files.verify_shards(folder, manifest)
    except DataError as e:
        return str(e)
    return "sound"


def problem_by_tasks(folder: Path) -> str:
    """The same by a running Ray. All that this process checks later is much too."""
    files.LITTLE = 0
    return problem_of(folder)
