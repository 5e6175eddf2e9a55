"""Job that runs mhmoe_ray.data.prepare.job serially, until SIGKILL ends it after a number of parts."""

import os
import signal
import sys
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

from mhmoe_ray.data.prepare.job import PrepareRequest
from mhmoe_ray.data.prepare.work import shared_folder
from tests.data.prepare.prepare_serially import run_tasks_serially, use_small_chunks


def kill_after_parts(part_count: int, pid: int, work_folder: Path, ready_event: Event) -> None:
    """Set `ready_event`, and kill the process `pid` as soon as `part_count` parts exist below `work_folder`.

    This runs in another process, because a thread of the job would get no time while the job writes parts.
    """
    ready_event.set()
    while len(list(work_folder.glob("parts/*/*.json"))) < part_count:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    use_small_chunks()
    run_tasks_serially()
    work = shared_folder(PrepareRequest.received().spec)
    spawn_context = get_context("spawn")
    ready_event = spawn_context.Event()
    spawn_context.Process(
        target=kill_after_parts, args=(int(sys.argv[1]), os.getpid(), work, ready_event), daemon=True
    ).start()
    # Wait until the other process watches the parts: its imports take longer than the job takes to write them.
    ready_event.wait()
    PrepareRequest.main()
