import dataclasses
import os
import sys
import time

import pytest

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.jobs import EXCLUDED_PATTERNS
from mhmoe_ray.cluster.runs import outcome, recorded_outcome, start_attempt
from mhmoe_ray.errors import ClusterError, JobError, SpecError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.specs import tiny_spec


def _submit(connection, job, code, **options):
    jobs.submit(connection, jobs.job_request(["-c", code], job, local=connection.local, **options))


def _wait(connection, job):
    while (status := jobs.status(connection, job)) in ("PENDING", "RUNNING"):
        time.sleep(0.2)
    return status


@pytest.mark.ray
def test_round_trip(connection, monkeypatch):
    # Ray's client would follow this one whatever address it is given.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    code = "import sys, time; print('one'); time.sleep(1); print(sys.executable); print('last', end='')"
    _submit(connection, "trip", code, metadata={"run": "r"})
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    followed = list(jobs.follow_logs(connection, "trip"))
    assert followed[-3:] == ["one", sys.executable, "last"]
    assert _wait(connection, "trip") == "SUCCEEDED"
    assert jobs.logs(connection, "trip").endswith(f"one\n{sys.executable}\nlast")
    assert followed == jobs.logs(connection, "trip").split("\n")
    with pytest.raises(JobError, match=r"job trip: .*already exists"):
        _submit(connection, "trip", code)


@pytest.mark.ray
def test_failure_shows_its_last_lines(connection):
    _submit(connection, "fails", "print('before'); raise ValueError('two\\nlines')")
    assert _wait(connection, "fails") == "FAILED"
    assert jobs.message(connection, "fails") == "ValueError: two lines"
    assert jobs.logs(connection, "fails").endswith("ValueError: two\nlines\n")


@pytest.mark.ray
def test_stop(connection):
    _submit(connection, "stops", "print('up'); import time; time.sleep(600)")
    lines = jobs.follow_logs(connection, "stops")
    while next(lines) != "up":
        pass
    lines.close()
    jobs.stop(connection, "stops")
    assert _wait(connection, "stops") == "STOPPED"
    jobs.stop(connection, "stops")  # again: no error


@pytest.mark.ray
def test_unknown_job(connection):
    assert jobs.status(connection, "none") is None
    for call in (jobs.logs, jobs.stop, lambda *args: list(jobs.follow_logs(*args))):
        with pytest.raises(JobError, match="job none: "):
            call(connection, "none")


@pytest.mark.ray
def test_wrong_runtime_env_is_a_mistake_of_the_spec(connection):
    with pytest.raises(SpecError, match=r"cluster.runtime_env: .*pip"):
        _submit(connection, "wrong", "pass", runtime_env={"pip": 3})


@pytest.mark.ray
def test_cluster_that_went_away(connection):
    unreachable = dataclasses.replace(connection, address="http://127.0.0.1:1")
    with pytest.raises(ClusterError, match="nothing answers there"):
        jobs.status(unreachable, "any")


@pytest.mark.ray
def test_other_clusters_are_sent_our_packages(connection):
    remote_connection = dataclasses.replace(connection, local=False)
    code = "import mhmoe_ray.cluster.jobs, mhmoe_kernels; print(mhmoe_ray.__file__); print(mhmoe_kernels.__file__)"
    _submit(remote_connection, "sent", code)
    assert _wait(remote_connection, "sent") == "SUCCEEDED"
    assert jobs.logs(remote_connection, "sent").count("/runtime_resources/py_modules_files/_ray_pkg_") == 2


@pytest.mark.ray
def test_a_second_start_of_one_attempt_does_not_call_the_first_one_failed(connection, tmp_path):
    run = create_run(tiny_spec(tmp_path).model_copy(update={"name": "twice"}))
    job = start_attempt(run, run.spec(), connection)
    run.attempts_file.unlink()  # as another process saw it before
    with pytest.raises(JobError, match=f"job {job}: .*already exists"):
        start_attempt(run, run.spec(), connection)
    add_attempt(run, Attempt(job, connection.address, True))  # a newer one, for which the job ends at once
    _wait(connection, job)
    run.attempts_file.unlink()
    unreachable = dataclasses.replace(connection, address="http://127.0.0.1:1")
    with pytest.raises(ClusterError, match="nothing answers there"):
        start_attempt(run, run.spec(), unreachable)
    assert [e for e in events.read(run) if "could not be submitted" in e.get("reason", "")] == []


@pytest.mark.ray
def test_a_job_that_a_cluster_does_not_know_yet_has_not_failed_while_its_code_may_be_on_its_way(connection, tmp_path):
    run = create_run(tiny_spec(tmp_path))

    def submitted(local, seconds_ago):
        add_attempt(run, Attempt("unknown", connection.address, local, time.time() - seconds_ago))
        return outcome(run, connection)

    assert submitted(False, 30) is None
    events.record(run, "began", attempt=1)  # so it was there
    with pytest.raises(ClusterError, match=r"it knows no job unknown, but the run wrote something \d+ s ago"):
        outcome(run, connection)  # behind a tunnel's address there may be another cluster now
    assert submitted(True, 12) is None  # which takes seconds from its record on
    assert submitted(True, 30).state == "failed"  # nothing is sent, and nobody else's cluster has our address
    os.utime(run.events_file, (0, 0))
    assert submitted(False, 1000).state == "failed"


@pytest.mark.ray
def test_a_run_whose_job_is_not_taken_has_failed(connection, tmp_path):
    run = create_run(tiny_spec(tmp_path, cluster={"runtime_env": {"pip": 3}}))
    with pytest.raises(SpecError, match="pip"):
        start_attempt(run, run.spec(), connection)
    assert recorded_outcome(events.read(run)).state == "failed"


def test_request_is_what_is_sent():
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
