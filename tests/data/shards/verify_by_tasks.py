"""Checks prepared folders as if there were much in them; prints a line for each.

Run as `python -m tests.data.shards.verify_by_tasks FOLDER ...` as a job.
"""

import sys
from pathlib import Path

import ray

from mhmoe_ray.data.shards import verify
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.errors import DataError


def problem_of(folder: Path) -> str:
    """Of a prepared folder, or that it is sound."""
    manifest = read_data_manifest(folder)
    assert manifest is not None
    try:
        verify.verify_shards(folder, manifest)
    except DataError as e:
        return str(e)
    return "sound"


if __name__ == "__main__":
    verify.LITTLE = 0
    ray.init(log_to_driver=False)
    for folder in map(Path, sys.argv[1:]):
        print(problem_of(folder), flush=True)
