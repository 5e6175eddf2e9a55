"""Processes that are killed, stopped, or unable to open files any more."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from mhmoe_ray.checkpoint.manifest import committed, unfinished
from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.local import find_local, start_local
from mhmoe_ray.cluster.spawn import family, is_ours
from mhmoe_ray.runs import history
from mhmoe_ray.train import malloc
from tests.cli.run import assert_one_line, mhmoe
from tests.faults import harness
from tests.watch import is_over, of_kind, started, step_of, wait_for_the_end, wait_until

pytestmark = pytest.mark.ray


def hurt(project, steps=120, cluster=None, **train):
    harness.spec_in(project, train={"steps": steps, **train}, cluster=cluster or {})
    return harness.submit(project)


def _environment(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


def test_two_random_kills_change_nothing(project, request):
    """The kills hit a worker, and the driver, whose run is resumed."""
    run = hurt(project, keep_checkpoints=2)
    worker = harness.workers(run, 1)[0]
    assert set(malloc.settings({}).items()) <= _environment(worker["pid"]).items()
    harness.soak(project, run, kills=2, seed=15)
    wait_for_the_end(run)
    reference = request.getfixturevalue("reference")  # only now, so that it was this run that prepared the data
    harness.assert_as_if_nothing_had_happened(run, reference)
    assert len(committed(run)) <= 3  # the best may be an older one
    assert unfinished(run) == []


@pytest.mark.slow  # tests/train/test_watchdog.py has whom it chooses
def test_a_rank_that_hangs_is_named_ended_and_costs_nothing(project, reference):
    """The rank is stopped, so that it lives but neither computes nor answers; the other rank waits for it in an
    exchange."""
    run = hurt(project, cluster={"hang_seconds": 15})
    stopped = harness.workers(run, 1)[1]
    assert harness.kill(stopped["pid"], signal.SIGSTOP)
    at = step_of(run)
    [hung] = wait_until(lambda: of_kind(run, "hung"), "the watchdog's word")
    assert (hung["rank"], hung["pid"], hung["silent"]) == (1, stopped["pid"], True)
    assert at - 1 <= hung["step"] <= at + 1
    wait_for_the_end(run)
    harness.assert_as_if_nothing_had_happened(run, reference)
    assert "rank 1 (process" in mhmoe(project, "status", run.id).out


@pytest.mark.slow
def test_a_worker_killed_while_a_checkpoint_is_written_costs_no_other_checkpoint(project, reference):
    run = hurt(project)
    victim = harness.workers(run, 1)[1]["pid"]

    what = "a checkpoint that is being written"
    folder = wait_until(lambda: harness.stopped_in_mid_checkpoint(run, victim), what)
    assert harness.kill(victim)
    wait_for_the_end(run)
    # Either the other rank had all it needed to commit it, or it was cleared away.
    assert unfinished(run) == []
    assert folder.exists() == (folder in committed(run))
    harness.assert_as_if_nothing_had_happened(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_workers_killed_in_mid_step_cost_nothing(project, reference, ranks):
    run = hurt(project)
    workers = harness.workers(run, 1)
    at = step_of(run)
    wait_until(lambda: step_of(run) > at, "the next step")
    assert all(harness.kill(workers[rank]["pid"]) for rank in ranks)
    wait_for_the_end(run)
    harness.assert_as_if_nothing_had_happened(run, reference)


@pytest.mark.slow
def test_a_run_outlives_the_whole_cluster(project, reference):
    run = hurt(project)
    harness.workers(run, 1)
    wait_until(lambda: step_of(run) >= 10, "ten steps")
    cluster = find_local()
    os.killpg(cluster.pid, signal.SIGKILL)
    wait_until(lambda: not is_ours(cluster.pid, cluster.folder), "the end of the cluster")
    start_local(8)
    # Nobody can ask that cluster any more, so that the user must: whether a job of it lives on.
    refused = mhmoe(project, "resume", run.id)
    assert_one_line(refused, 7, "its cluster does not answer", "make sure that no job of it runs any more", "--force")
    wait_until(lambda: not harness.driver_of(run), "the end of its job")
    resumed = mhmoe(project, "resume", run.id, "--force")
    assert resumed.code == 0, resumed.err
    harness.assert_as_if_nothing_had_happened(run, reference)


def reserved() -> int:
    """Return the number of placement groups that the cluster has now."""
    connection = connect(None)
    told = dashboard.get(connection.address, "/api/v0/placement_groups?limit=1000", connection.token)
    return sum(group["state"] == "CREATED" for group in told["data"]["result"]["result"])


@pytest.mark.slow
def test_a_controller_that_dies_ends_its_job_which_leaves_nothing(project, reference):
    """The controller is Ray Train's.

    Our runs go without the process by which Ray Train itself sees to the end of its controller.
    """
    run = hurt(project)
    ranks = [worker["pid"] for worker in harness.workers(run, 1)]
    assert reserved() == 1
    own = {process.pid for process in family(find_local().pid)}
    named = {process.pid: process.info["name"] for process in psutil.process_iter(["name"])}
    [controller] = [pid for pid in own & named.keys() if named[pid].startswith("ray::TrainCon")]
    assert harness.kill(controller)
    wait_until(lambda: harness.outcome(project, run) == "failed", "the job's end")
    wait_until(lambda: not any(map(psutil.pid_exists, ranks)), "the workers' end")
    wait_until(lambda: reserved() == 0, "the end of what they had")
    assert mhmoe(project, "resume", run.id).code == 0
    harness.assert_as_if_nothing_had_happened(run, reference)


@pytest.mark.slow
def test_a_worker_that_can_open_no_file_costs_nothing(project, reference):
    """The worker fails at its next checkpoint at the latest, and says so."""
    import resource

    run = hurt(project)
    pid = harness.workers(run, 1)[1]["pid"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
    wait_until(lambda: is_over(run) or len(started(run)) > 1, "its end")
    if harness.outcome(project, run) == "failed":
        assert "Too many open files" in mhmoe(project, "status", run.id).out.replace("\n", " ")
        assert mhmoe(project, "resume", run.id).code == 0
    wait_for_the_end(run)
    harness.assert_as_if_nothing_had_happened(run, reference)


@pytest.mark.soak
def test_fifty_random_kills_change_nothing(project):
    seed, kills, steps = int(os.environ.get("SOAK_SEED", "1")), int(os.environ.get("SOAK_KILLS", "50")), 2400
    harness.spec_in(project, train={"steps": steps})
    undisturbed = harness.submit(project)
    wait_for_the_end(undisturbed, 1000)
    run = hurt(project, steps)
    harness.soak(project, run, kills, seed)
    wait_for_the_end(run, 1000)
    assert len(history.read(run)) == steps
    harness.assert_as_if_nothing_had_happened(run, undisturbed)
