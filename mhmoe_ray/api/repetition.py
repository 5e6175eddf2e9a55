"""Check that a run can be resumed: a job repeats its last steps (train/repetition.py), in a folder that is removed."""

import secrets
import time

from mhmoe_ray.api import attempts
from mhmoe_ray.api.connection import check_placement, connect_to_train
from mhmoe_ray.api.defaults import OnNote
from mhmoe_ray.api.trust import require_submitted_settings
from mhmoe_ray.cluster import jobs, remote
from mhmoe_ray.cluster.connect import Connection, require_known
from mhmoe_ray.runs.directory import RunDir, last_attempt
from mhmoe_ray.storage import Location, remove_tree
from mhmoe_ray.train.repetition import CheckRequest, ResumeCheck, find_repetition

REMOVAL_ATTEMPTS = 20


def check_resume(run: RunDir, address: str | None, force: bool, trust_run: bool, on_note: OnNote) -> ResumeCheck:
    """Repeat the last steps of a run and compare them, as `Run.check_resume`. Ctrl-C ends the repetition."""
    previous_attempt = last_attempt(run)
    attempts.final_outcome(run, force, given_addresses=[address] if address else [])
    if not trust_run:
        require_submitted_settings(run, run.spec())
    request = CheckRequest(path=str(run.path), token=secrets.token_hex(4))
    spec = find_repetition(run).spec(request.folder)
    address = address or require_known(attempts.attempt_address(previous_attempt))
    connection = connect_to_train(spec, address, on_note)
    check_placement(spec.cluster, connection)
    try:
        job = remote.submit(connection, spec.cluster.runtime_env, request, on_note)
        for line in job.progress():
            on_note(line)
        return job.result(f"repetition of run {run.id}")
    finally:
        # A job that has ended by itself has removed its folder.
        _end_job(connection, remote.submission_id(request.job_name), request.folder)


def _end_job(connection: Connection, job: str, folder: Location) -> None:
    """End a repetition that goes on, and remove its folder."""
    if jobs.is_alive(connection, job):
        jobs.stop(connection, job)
    while jobs.is_alive(connection, job):
        time.sleep(attempts.POLL_SECONDS)
    # Workers may write for a moment after the end of their job, and an object store lists what was just removed.
    for _ in range(REMOVAL_ATTEMPTS):
        if not folder.exists():
            return
        remove_tree(folder, ignore_errors=True)
        time.sleep(attempts.POLL_SECONDS)
    remove_tree(folder)
