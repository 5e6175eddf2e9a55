"""Checks prepared folders as if there were much in them; prints a line for each.

Run as `python -m tests.data.shards.verify_by_tasks FOLDER ...` as a job.
"""

import sys
from pathlib import Path

import ray

from mhmoe_ray.data.shards import verify
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.errors import DataError

if __name__ == "__main__":
    verify.LITTLE = 0
    ray.init(log_to_driver=False)
    for folder in map(Path, sys.argv[1:]):
        manifest = read_data_manifest(folder)
        assert manifest is not None
        try:
            verify.verify_shards(folder, manifest)
            print("sound", flush=True)
        except DataError as e:
            print(e, flush=True)
