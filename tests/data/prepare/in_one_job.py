"""Do one thing after another in a single job, whose start takes longer than most of them.

Run as `python -m tests.data.prepare.in_one_job HOW PATH ...` as a job. HOW is

check        check by tasks whether a prepared folder is sound, and print one line
together     prepare a spec
WORLD:START  read what a spec trains on from position START, split over WORLD workers, into a JSON file beside the spec:
             Ray's lines would break the long lines that a job prints
serially     prepare a spec as prepare_serially does; all later preparations are then serial too
"""

import json
import sys
from pathlib import Path

import ray

from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.spec import load_resolved_spec
from tests.data.prepare.prepare_serially import in_small_chunks, one_task_at_a_time
from tests.data.read_splits import read_splits
from tests.data.shards.verify_by_tasks import problem_by_tasks


def do(how: str, path: Path) -> None:
    if how == "check":
        print(problem_by_tasks(path), flush=True)
    elif ":" in how:
        found = read_splits(load_resolved_spec(path), *map(int, how.split(":")))
        path.with_suffix(".json").write_text(json.dumps({how: found}))
    else:
        if how == "serially":
            in_small_chunks()
            one_task_at_a_time()
        prepare(load_resolved_spec(path))


if __name__ == "__main__":
    ray.init()
    for how, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        do(how, Path(path))
