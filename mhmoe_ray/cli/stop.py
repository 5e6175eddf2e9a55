"""`mhmoe stop`: end a run after a last checkpoint."""

import time

from mhmoe_ray.cli.common import STORAGE, RunArg, StorageOption, note, out

POLL_SECONDS = 0.5


def stop(run: RunArg = None, storage: StorageOption = STORAGE) -> None:
    """Ask a run to end: its workers finish their step, validate, save a checkpoint and stop. `resume` goes on from it.

    A run whose workers are not training yet is ended at once.
    """
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.watch import outcome, recorded_outcome
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs import events
    from mhmoe_ray.runs.layout import find_run
    from mhmoe_ray.runs.state import read_attempts

    found = find_run(run, storage)
    over = recorded_outcome(found)
    if over:
        raise RunError(f"run {found.id}", f"it is {over.state} already", "see `mhmoe status`")
    attempt = read_attempts(found)[-1]
    connection = connect(attempt.address)
    if events.state(events.events(found)) != "running":
        jobs.stop(connection, attempt.job)
        events.record(found, "stopped", step=0)
    else:
        found.stop_file.touch()
        note.print("waiting for its checkpoint")
    while (over := outcome(found, connection)) is None:
        time.sleep(POLL_SECONDS)
    out.print(f"run {found.id} {over.state}{': ' + over.reason if over.reason else ''}")
