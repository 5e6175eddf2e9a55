"""`mhmoe stop`: end a run after a last checkpoint."""

import time
from typing import Annotated

import typer

from mhmoe_ray.cli.common import RunArg, StorageOption, note, out, say
from mhmoe_ray.cli.complete import STORAGE

POLL_SECONDS = 0.5


def stop(
    run: RunArg = None,
    now: Annotated[bool, typer.Option("--now", help="End its job at once, without a last checkpoint.")] = False,
    storage: StorageOption = STORAGE,
) -> None:
    """Ask a run to end: its workers finish their step, validate, save a checkpoint and stop. `resume` goes on from it.

    A run whose workers are not training yet is ended at once.
    """
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.dashboard import Patience
    from mhmoe_ray.cluster.runs import outcome, recorded_outcome
    from mhmoe_ray.errors import ClusterError, RunError, TokenError
    from mhmoe_ray.runs import events
    from mhmoe_ray.runs.directory import find_run, last_attempt

    found = find_run(run, storage, with_job=True)
    attempt = last_attempt(found)
    happened = events.events(found)
    over = recorded_outcome(happened)
    if over:
        raise RunError(f"run {found.id}", f"it is {over.state} already", "see `mhmoe status`")
    trains = events.state(happened) == "running"
    try:
        connection = connect(attempt.address)
    except TokenError:
        raise
    except ClusterError as e:
        if now or not trains:
            raise
        # Its cluster may be within a batch job, where no command reaches it; workers read the directory.
        found.stop_file.touch()
        note.print(f"asked for in its directory; whether it happens is not seen from here: {e.why}", soft_wrap=True)
        return
    found.stop_file.touch()
    if now or events.state(events.events(found)) != "running":  # to connect may have taken long
        jobs.stop(connection, attempt.job)
    else:
        note.print("waiting for its checkpoint; `mhmoe stop --now` does not")
    patience = Patience(say)
    while (over := patience.ask(lambda: outcome(found, connection), None)) is None:
        time.sleep(POLL_SECONDS)
    if over.state == "stopped" and recorded_outcome(events.events(found)) is None:
        events.record(found, "stopped", reason="its job was ended")
    out.print(f"run {found.id} {over.state}{': ' + over.reason if over.reason else ''}", soft_wrap=True)
