import asyncio
import dataclasses
import os
import sys
import threading
import time

import pytest

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.packages import EXCLUDED_PATTERNS
from mhmoe_ray.cluster.runs import outcome, recorded_outcome, start_attempt
from mhmoe_ray.errors import ClusterError, JobError, SpecError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.support.specs import tiny_spec


def _submit(connection, job, code, **options):
    """Submit a job that runs Python code."""
    jobs.submit(connection, jobs.job_request(["-c", code], job, local=connection.local, **options))


def _wait(connection, job):
    """Wait until a job has ended, and return its status."""
    while (info := jobs.info(connection, job)).is_alive:
        time.sleep(0.2)
    return info.status


async def _follow_in_loop(connection, job):
    """Return the lines of a job's log, read in a thread that runs an event loop, as a notebook's cells do."""
    return list(jobs.follow_logs(connection, job))


@pytest.mark.ray
def test_job_runs_and_its_log_can_be_followed(connection, monkeypatch):
    # Ray's client prefers the address in this variable to its argument, so our code has to hide the variable from it.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    code = "import sys, time; print('one'); time.sleep(1); print(sys.executable); print('last', end='')"
    _submit(connection, "trip", code, metadata={"run": "r"})
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    followed = asyncio.run(_follow_in_loop(connection, "trip"))
    # Ray flushes its line about the entrypoint after it has started the job, so it may stand after the first lines.
    own_lines = [line for line in followed if not line.startswith("Running entrypoint")]
    assert own_lines[-3:] == ["one", sys.executable, "last"]
    assert _wait(connection, "trip") == "SUCCEEDED"
    assert followed == jobs.logs(connection, "trip").split("\n") == list(jobs.follow_logs(connection, "trip"))
    with pytest.raises(JobError, match=r"job trip: .*already exists"):
        _submit(connection, "trip", code)


@pytest.mark.ray
def test_failed_job_has_its_last_log_line_as_message(connection):
    _submit(connection, "fails", "print('before'); raise ValueError('two\\nlines')")
    assert _wait(connection, "fails") == "FAILED"
    assert jobs.info(connection, "fails").message == "ValueError: two lines"
    assert "ValueError: two\nlines\n" in jobs.logs(connection, "fails")


def test_late_line_of_a_worker_is_no_reason():
    """Ray adds lines of the workers' logs after the job's own last line if the machine is busy."""
    worker_line = "\n(RayTrainWorker pid=4790) 2026-12-01T01:09:30+0000 rank 1 INFO 2 workers, from step 0 on"
    error = "error 7: disk d: Read-only file system; make it writable"
    message = f"job failed, last available logs:\n{error}"
    assert jobs.failure_reason(message + worker_line) == error
    assert jobs.failure_reason(f"{message}\nRuntimeError: no rank{worker_line}") == "RuntimeError: no rank"


def test_line_about_the_entrypoint_is_no_reason():
    text = "before\nValueError: two\nlines\nRunning entrypoint for job a: python -c 'print(1)'\n . .\n"
    assert jobs.failure_reason(text) == "ValueError: two lines"


@pytest.mark.ray
def test_stop_ends_a_job_and_can_be_repeated(connection):
    _submit(connection, "stops", "print('up'); import time; time.sleep(600)")
    lines = jobs.follow_logs(connection, "stops")
    while next(lines) != "up":
        pass
    lines.close()
    assert "log" not in [thread.name for thread in threading.enumerate()]
    jobs.stop(connection, "stops")
    assert _wait(connection, "stops") == "STOPPED"
    jobs.stop(connection, "stops")  # stopping a stopped job is no error


@pytest.mark.ray
def test_unknown_job_has_no_info_and_other_calls_fail(connection, local_cluster):
    """The dashboard must not log the cluster's token, which is in the headers of each request."""
    assert jobs.info(connection, "none") is None
    for call in (jobs.logs, jobs.stop, lambda *args: list(jobs.follow_logs(*args))):
        with pytest.raises(JobError, match="job none: "):
            call(connection, "none")
    logs = [path.read_text(errors="replace") for path in local_cluster.folder.rglob("dashboard*.log")]
    assert logs
    assert not [log for log in logs if connection.token.value in log]


@pytest.mark.ray
def test_invalid_runtime_env_is_a_spec_error(connection):
    with pytest.raises(SpecError, match=r"cluster.runtime_env: .*pip"):
        _submit(connection, "wrong", "pass", runtime_env={"pip": 3})


@pytest.mark.ray
def test_unreachable_cluster_is_an_error(connection):
    unreachable = dataclasses.replace(connection, address="http://127.0.0.1:1")
    with pytest.raises(ClusterError, match="nothing answers there"):
        jobs.info(unreachable, "any")


@pytest.mark.ray
def test_jobs_on_other_clusters_import_the_packages_that_were_sent(connection):
    remote_connection = dataclasses.replace(connection, local=False)
    code = "import mhmoe_ray.cluster.jobs, mhmoe_kernels; print(mhmoe_ray.__file__); print(mhmoe_kernels.__file__)"
    _submit(remote_connection, "sent", code)
    assert _wait(remote_connection, "sent") == "SUCCEEDED"
    assert jobs.logs(remote_connection, "sent").count("/runtime_resources/py_modules_files/_ray_pkg_") == 2


@pytest.mark.ray
def test_second_start_of_an_attempt_does_not_record_a_failure(connection, tmp_path):
    run = create_run(tiny_spec(tmp_path).model_copy(update={"name": "twice"}))
    job = start_attempt(run, run.spec(), connection)
    # Without the file, the second start gets the number of the first, as in a process that read the file before the
    # first start.
    run.attempts_file.unlink()
    with pytest.raises(JobError, match=f"job {job}: .*already exists"):
        start_attempt(run, run.spec(), connection)
    add_attempt(
        run, Attempt(job, connection.address, True)
    )  # the run now has a newer attempt, so the job of the first attempt ends at once
    _wait(connection, job)
    run.attempts_file.unlink()
    unreachable = dataclasses.replace(connection, address="http://127.0.0.1:1")
    with pytest.raises(ClusterError, match="nothing answers there"):
        start_attempt(run, run.spec(), unreachable)
    assert [e for e in events.read(run) if "could not be submitted" in e.get("reason", "")] == []


@pytest.mark.ray
def test_unknown_job_has_not_failed_while_it_may_still_be_submitted(connection, tmp_path):
    run = create_run(tiny_spec(tmp_path))

    def outcome_of_attempt(local, seconds_ago):
        """Return the outcome of the run after an attempt with an unknown job was submitted some seconds ago."""
        add_attempt(run, Attempt("unknown", connection.address, local, time.time() - seconds_ago))
        return outcome(run, connection)

    assert outcome_of_attempt(False, 30) is None
    events.record(run, "began", attempt=1)  # the job began, so the cluster must have known it
    with pytest.raises(ClusterError, match=r"it knows no job unknown, but the run wrote something \d+ s ago"):
        # The cluster does not know the job, so the address, for example of a tunnel, may lead to another cluster now.
        outcome(run, connection)
    # The submission may still go on: it takes some seconds after the attempt was recorded.
    assert outcome_of_attempt(True, 12) is None
    # After 30 s without a job the attempt has failed, because nothing large is sent to the local cluster, and no other
    # cluster has its address.
    assert outcome_of_attempt(True, 30).state == "failed"
    os.utime(run.events_file, (0, 0))
    assert outcome_of_attempt(False, 1000).state == "failed"


@pytest.mark.ray
def test_run_whose_job_is_refused_has_failed(connection, tmp_path):
    run = create_run(tiny_spec(tmp_path, cluster={"runtime_env": {"pip": 3}}))
    with pytest.raises(SpecError, match="pip"):
        start_attempt(run, run.spec(), connection)
    assert recorded_outcome(events.read(run)).state == "failed"


def test_job_request_has_command_environment_and_metadata():
    assert jobs.job_request(["-m", "x", "a b"], "j", local=True, metadata={"run": "r"}) == {
        "entrypoint": f"{sys.executable} -m x 'a b'",
        "submission_id": "j",
        "runtime_env": {},
        "metadata": {"run": "r"},
    }
    runtime_env = {"pip": ["x"], "excludes": ["*.md"]}
    env = jobs.job_request([], "j", local=False, runtime_env=runtime_env)["runtime_env"]
    assert [m.rpartition("/")[2] for m in env.pop("py_modules")] == ["mhmoe_ray", "mhmoe_kernels"]
    assert env == {"pip": ["x"], "excludes": ["*.md", *EXCLUDED_PATTERNS]}
    assert runtime_env == {"pip": ["x"], "excludes": ["*.md"]}
