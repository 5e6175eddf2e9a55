"""Does one thing after another in a single job, whose start takes longer than any of them.

Run as `python -m tests.data.prepare.prepare_each HOW PATH ...` as a job. HOW is `check`, of a prepared folder, which
prints a line; `together`, of a spec to prepare; or `serially`, as prepare_serially does, and so do all that follow.
"""

import sys
from pathlib import Path

import ray

from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.spec import load_resolved_spec
from tests.data.prepare.prepare_serially import in_small_chunks, one_task_at_a_time
from tests.data.shards.verify_by_tasks import problem_by_tasks


def main() -> None:
    ray.init()
    for how, path in zip(sys.argv[1::2], map(Path, sys.argv[2::2]), strict=True):
        if how == "check":
            print(problem_by_tasks(path), flush=True)
            continue
        if how == "serially":
            in_small_chunks()
            one_task_at_a_time()
        prepare(load_resolved_spec(path))


if __name__ == "__main__":
    main()
