"""Job that runs several tasks in turn, because starting a job takes longer than most of them.

It runs as `python -m tests.data.prepare.in_one_job TASK PATH ...`. PATH is a prepared folder for the task `check`, and
the file of a spec for the others. TASK is

check        verify a prepared folder by Ray tasks, and print the report
together     prepare the data of a spec by parallel tasks
WORLD:START  read the training samples of a spec from position START, split over WORLD workers, into a JSON file beside
             the spec; they are not printed, because Ray's output would break such long lines
serially     prepare the data of a spec as prepare_serially does; all later preparations are then serial too
"""

import json
import sys
from pathlib import Path

import ray

from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.spec import load_resolved_spec
from tests.data.prepare.prepare_serially import run_tasks_serially, use_small_chunks
from tests.data.read_splits import read_splits
from tests.data.shards.verify_by_tasks import verification_report_by_tasks


def run_task(task: str, path: Path) -> None:
    if task == "check":
        print(verification_report_by_tasks(path), flush=True)
    elif ":" in task:
        batches = read_splits(load_resolved_spec(path), *map(int, task.split(":")))
        path.with_suffix(".json").write_text(json.dumps({task: batches}))
    else:
        if task == "serially":
            use_small_chunks()
            run_tasks_serially()
        prepare(load_resolved_spec(path))


if __name__ == "__main__":
    ray.init()
    for task, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        run_task(task, Path(path))
