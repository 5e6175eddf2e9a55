"""mhmoe_ray.data.prepare.job in small chunks, one at a time, killed by SIGKILL when so many parts are there."""

import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import yaml

from mhmoe_ray.data.prepare.job import main
from mhmoe_ray.data.prepare.work import shared_folder
from mhmoe_ray.spec import RunSpec
from tests.data.prepare.prepare_serially import in_small_chunks, one_task_at_a_time


def kill_at(parts: int, pid: int, work: Path) -> None:
    """By a process of its own: a thread of the job would wait for its turn while parts are made."""
    while len(list(work.glob("parts/*/*.json"))) < parts:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    in_small_chunks()
    one_task_at_a_time()
    work = shared_folder(RunSpec.model_validate(yaml.safe_load(os.environ["MHMOE_SPEC"])))
    get_context("spawn").Process(target=kill_at, args=(int(sys.argv[1]), os.getpid(), work), daemon=True).start()
    main()
