"""Test of the servers that fork the workers of Ray in `make test`."""

import subprocess
import sys
from pathlib import Path

FORKED_IDS = """
import os
from worker_forks import JOB_MODULES, import_ray_modules

import_ray_modules(JOB_MODULES)
for _ in range(2):
    if not os.fork():
        import ray

        print(ray.ObjectRef.from_random().hex(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_forked_workers_draw_different_ids():
    """Otherwise two workers could give the same id to their tasks, and a worker with both tasks would crash."""
    folder = Path(__file__).parent / "ray_forks"
    process = subprocess.run([sys.executable, "-c", FORKED_IDS], cwd=folder, capture_output=True, text=True, check=True)
    first_id, second_id = process.stdout.split()[-2:]
    assert first_id != second_id
