"""Tests of runs that are stored on S3: they are stopped, killed, inspected and resumed, and the store fails."""

import subprocess
from secrets import token_hex

import pytest

from mhmoe_ray.checkpoint.manifest import uncommitted_checkpoints
from mhmoe_ray.runs.directory import list_runs
from tests.cli.run import command, mhmoe
from tests.faults import harness
from tests.support.proxy import Fault, FaultyProxy
from tests.support.s3 import CREDENTIALS
from tests.support.watch import events_of_kind, run_has_ended, step_of, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def submit_to_s3(project, query, steps):
    """Submit a run of some steps stored with its data on the S3 server; return it and the URI of its storage."""
    folder = f"s3://bucket/{token_hex(3)}"
    storage, data = f"{folder}?{query}", {"prepared": f"{folder}-data?{query}"}
    cluster = {"runtime_env": {"env_vars": CREDENTIALS}, "shard_cache": {"path": str(project / "cache")}}
    harness.write_random_spec(project, train={"steps": steps}, cluster=cluster, data=data)
    result = mhmoe(project, "submit", "spec.yaml", "--set", f"storage={storage}", "--detach")
    assert result.code == 0, result.err
    [run] = list_runs(storage)
    return run, storage


def test_a_run_on_s3_is_stopped_inspected_and_resumed(project, reference, s3):
    query, _ = s3
    run, storage = submit_to_s3(project, query, 120)
    harness.workers_of_start(run, 1)
    # This is what `mhmoe stop` does, without the time that the command takes to start.
    run.stop_file.touch()
    wait_until(lambda: run_has_ended(run), "its end")
    assert 0 < step_of(run) < 120
    resumed = mhmoe(project, "resume", run.id, "--storage", storage)
    assert resumed.code == 0, resumed.err
    harness.assert_equals_undisturbed_run(run, reference)
    assert "120 of 120" in mhmoe(project, "status", "--storage", storage).out
    assert run.id in mhmoe(project, "list", "--storage", storage).out
    assert mhmoe(project, "ckpt", "verify", run.id, "--storage", storage).code == 0


def test_a_run_on_s3_survives_a_kill_during_an_upload(project, reference, s3):
    query, _ = s3
    run, _ = submit_to_s3(project, query, 120)
    worker_pids = harness.workers_of_start(run, 1)
    wait_until(lambda: events_of_kind(run, "checkpoint"), "a checkpoint")
    wait_until(
        lambda: harness.stop_during_checkpoint(run, worker_pids[0]["pid"]), "a checkpoint that is being uploaded"
    )
    assert harness.kill(worker_pids[0]["pid"])
    wait_for_end(run)
    harness.assert_equals_undisturbed_run(run, reference)
    assert uncommitted_checkpoints(run) == []


def test_an_unreachable_store_costs_no_step_and_ends_no_follower(project, reference, s3):
    """The store, which has the data and the run, is unreachable for longer than its client library retries."""
    query, _ = s3
    proxy = FaultyProxy(int(query.rpartition(":")[2]))
    run, storage = submit_to_s3(project, f"{query.rpartition(':')[0]}:{proxy.port}", 120)
    following = subprocess.Popen(
        command("status", run.id, "--watch", "--storage", storage),
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    harness.workers_of_start(run, 1)
    wait_until(lambda: events_of_kind(run, "checkpoint"), "a checkpoint")
    proxy.close_for(60)
    wait_for_end(run)
    harness.assert_equals_undisturbed_run(run, reference)
    out, err = following.communicate(timeout=60)
    assert (following.returncode, "finished" in out.splitlines()[-1]) == (0, True), err


def test_a_run_whose_transfers_are_disturbed_equals_an_undisturbed_one(project, reference, s3):
    query, _ = s3
    proxy = FaultyProxy(int(query.rpartition(":")[2]))
    proxy.disturb(Fault("reset", "PUT", "/weights/"), Fault("cut", "PUT", "/optim/"))
    proxy.disturb(Fault("stall", "PUT", "/weights/"), Fault("reset", "PUT", "/manifest.json"))
    run, _ = submit_to_s3(project, f"{query.rpartition(':')[0]}:{proxy.port}", 120)
    [worker, _] = harness.workers_of_start(run, 1)
    wait_until(lambda: not proxy.pending_faults and events_of_kind(run, "checkpoint"), "disturbed uploads")
    # The workers that start after the kill download the newest checkpoint.
    for folder in ("/weights/", "/optim/"):
        proxy.disturb(Fault("reset", "GET", folder), Fault("cut", "GET", folder), Fault("stall", "GET", folder))
    assert harness.kill(worker["pid"])
    wait_for_end(run)
    assert proxy.pending_faults == []
    harness.assert_equals_undisturbed_run(run, reference)
