"""Run mhmoe_ray.data.prepare.job in small chunks, one at a time, until SIGKILL ends it after a given number of
parts."""

import os
import signal
import sys
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

from mhmoe_ray.data.prepare.job import PrepareRequest, main
from mhmoe_ray.data.prepare.work import shared_folder
from tests.data.prepare.prepare_serially import in_small_chunks, one_task_at_a_time


def kill_at(parts: int, pid: int, work: Path, ready: Event) -> None:
    """Kill a process when `parts` parts exist below `work`.

    This runs in a process of its own: a thread of the job would wait for its turn while parts are made.
    """
    ready.set()
    while len(list(work.glob("parts/*/*.json"))) < parts:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    in_small_chunks()
    one_task_at_a_time()
    work = shared_folder(PrepareRequest.received().spec)
    spawn = get_context("spawn")
    ready = spawn.Event()
    spawn.Process(target=kill_at, args=(int(sys.argv[1]), os.getpid(), work, ready), daemon=True).start()
    ready.wait()  # it imports for longer than parts take
    main()
