"""Tests of runs whose processes are killed, suspended, or unable to open more files.

A fault "changes nothing" if the run equals an undisturbed one in all bits.
"""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mhmoe_ray.checkpoint.manifest import committed_checkpoints, uncommitted_checkpoints
from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.local import find_local, start_local
from mhmoe_ray.cluster.spawn import is_ray_of, process_tree
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train import malloc
from tests.cli.run import assert_one_line, command, mhmoe
from tests.faults import harness
from tests.support.offline_tracker import offline_history
from tests.support.watch import run_has_ended, start_events, step_of, wait_for_end, wait_until

pytestmark = pytest.mark.ray


def started_run(project, steps=120, cluster=None, **train):
    """Submit a run with these keys of the sections train and cluster, and return it."""
    harness.write_random_spec(project, train={"steps": steps, **train}, cluster=cluster or {})
    return harness.submit(project)


def _environment(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


@pytest.mark.slow  # tests/train/test_vision_runs.py has the quick test of a kill
def test_two_random_kills_change_nothing(project, request):
    """The seed kills a worker and then the driver, after which the run is resumed."""
    run = started_run(project, keep_checkpoints=2)
    worker = harness.workers_of_start(run, 1)[0]
    assert set(malloc.malloc_settings({}).items()) <= _environment(worker["pid"]).items()
    harness.soak(project, run, kills=2, seed=15)
    wait_for_end(run)
    # The fixture is requested only now, so that the run above prepares the data.
    reference = request.getfixturevalue("reference")
    harness.assert_equals_undisturbed_run(run, reference)
    assert len(committed_checkpoints(run)) <= 3  # the two newest ones, and the best one if it is older
    assert uncommitted_checkpoints(run) == []


@pytest.mark.slow
def test_a_worker_killed_while_a_checkpoint_is_written_damages_no_other_checkpoint(project, reference):
    run = started_run(project)
    victim = harness.workers_of_start(run, 1)[1]["pid"]

    description = "a checkpoint that is being written"
    folder = wait_until(lambda: harness.stop_during_checkpoint(run, victim), description)
    assert harness.kill(victim)
    wait_for_end(run)
    # Either the other rank had all that it needed to commit the checkpoint, or the checkpoint was cleaned up later. In
    # both cases no uncommitted checkpoint is left.
    assert uncommitted_checkpoints(run) == []
    assert folder.exists() == (folder in committed_checkpoints(run))
    harness.assert_equals_undisturbed_run(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_workers_killed_within_a_step_change_nothing(project, reference, ranks):
    run = started_run(project)
    workers = harness.workers_of_start(run, 1)
    step_before = step_of(run)
    wait_until(lambda: step_of(run) > step_before, "the next step")
    assert all(harness.kill(workers[rank]["pid"]) for rank in ranks)
    wait_for_end(run)
    harness.assert_equals_undisturbed_run(run, reference)


@pytest.mark.slow
def test_a_run_outlives_the_whole_cluster(project, reference):
    run = started_run(project)
    harness.workers_of_start(run, 1)
    wait_until(lambda: step_of(run) >= 10, "ten steps")
    cluster = find_local()
    os.killpg(cluster.pid, signal.SIGKILL)
    wait_until(lambda: not is_ray_of(cluster.pid, cluster.folder), "the end of the cluster")
    start_local(8)
    # The dead cluster cannot say whether the job still runs, so the user has to make sure that it does not and give
    # --force.
    result = mhmoe(project, "resume", run.id)
    assert_one_line(
        result, 7, "its cluster does not answer", "make sure that no job of it runs any more", "or force it"
    )
    wait_until(lambda: not harness.driver_of(run), "the end of its job")
    resumed = mhmoe(project, "resume", run.id, "--force")
    assert resumed.code == 0, resumed.err
    harness.assert_equals_undisturbed_run(run, reference)


def placement_group_count() -> int:
    """Return the number of placement groups that hold resources on the cluster now."""
    connection = connect(None)
    answer = dashboard.get(connection.address, "/api/v0/placement_groups?limit=1000", connection.token)
    return sum(group["state"] == "CREATED" for group in answer["data"]["result"]["result"])


@pytest.mark.slow
def test_a_controller_that_dies_ends_its_job_and_releases_its_resources(project, reference):
    """Our runs do without the process by which Ray Train releases the resources of a controller that has died."""
    run = started_run(project)
    ranks = [worker["pid"] for worker in harness.workers_of_start(run, 1)]
    assert placement_group_count() == 1
    cluster_pids = {process.pid for process in process_tree(find_local().pid)}
    process_names = {process.pid: process.info["name"] for process in psutil.process_iter(["name"])}
    [controller] = [
        pid for pid in cluster_pids & process_names.keys() if process_names[pid].startswith("ray::TrainCon")
    ]
    assert harness.kill(controller)
    wait_until(lambda: harness.outcome(project, run) == "failed", "the job's end")
    wait_until(lambda: not any(map(psutil.pid_exists, ranks)), "the workers' end")
    wait_until(lambda: placement_group_count() == 0, "the end of their placement group")
    assert mhmoe(project, "resume", run.id).code == 0
    harness.assert_equals_undisturbed_run(run, reference)


def submit_and_kill(project: Path, condition: Callable[[RunDir], bool]) -> RunDir:
    """Start `mhmoe submit`, which follows its run, kill it as soon as the run fits `condition`, and return the run."""
    old_paths = set((project / "runs").glob("*"))
    submitting = subprocess.Popen(command("submit", "spec.yaml"), cwd=project, stdout=subprocess.DEVNULL)
    try:
        [path] = wait_until(lambda: set((project / "runs").glob("*")) - old_paths, "the run's folder")
        wait_until(lambda: condition(RunDir(path)), "the moment of the kill")
    finally:
        submitting.kill()
        submitting.wait()
    return RunDir(path)


@pytest.mark.slow
def test_a_run_outlives_the_command_that_submitted_it(project, reference):
    harness.write_random_spec(project, train={"steps": 120})
    run = submit_and_kill(project, lambda run: step_of(run) >= 5)
    assert harness.outcome(project, run) == "running"
    wait_for_end(run)
    assert harness.outcome(project, run) == "finished"
    harness.assert_equals_undisturbed_run(run, reference)


@pytest.mark.slow
def test_a_submit_that_is_killed_midway_leaves_a_run_whose_status_is_told(project, reference):
    """The command is killed when the run's folder exists, before or after its job is submitted."""
    harness.write_random_spec(project, train={"steps": 120})
    run = submit_and_kill(project, lambda run: run.spec_file.exists())
    status = mhmoe(project, "status", str(run.path))
    if status.code:
        assert_one_line(status, 7, run.id)
    else:
        # If the cluster never gets the job, nobody records an end, and the status follows from the cluster's answer.
        states = ("finished", "failed")
        wait_until(lambda: harness.outcome(project, run) in states, "an end of the run")
    # In all cases the same command then trains a run.
    next_run = harness.submit(project)
    wait_for_end(next_run)
    harness.assert_equals_undisturbed_run(next_run, reference)


@pytest.mark.slow
def test_a_worker_that_can_open_no_file_changes_nothing(project, reference):
    """The worker fails at its next checkpoint at the latest, and the reason is reported."""
    import resource

    run = started_run(project)
    pid = harness.workers_of_start(run, 1)[1]["pid"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
    wait_until(lambda: run_has_ended(run) or len(start_events(run)) > 1, "its end")
    if harness.outcome(project, run) == "failed":
        assert "Too many open files" in mhmoe(project, "status", run.id).out.replace("\n", " ")
        assert mhmoe(project, "resume", run.id).code == 0
    wait_for_end(run)
    harness.assert_equals_undisturbed_run(run, reference)


@pytest.mark.soak
def test_fifty_random_kills_change_nothing(project):
    seed, kills, steps = int(os.environ.get("SOAK_SEED", "1")), int(os.environ.get("SOAK_KILLS", "50")), 2400
    harness.write_random_spec(project, train={"steps": steps})
    undisturbed_run = harness.submit(project)
    wait_for_end(undisturbed_run, 1000)
    run = started_run(project, steps)
    harness.soak(project, run, kills, seed)
    wait_for_end(run, 1000)
    assert len(history.read(run)) == steps
    harness.assert_equals_undisturbed_run(run, undisturbed_run)


@pytest.mark.slow
def test_trackers_have_each_step_once_after_five_kills(project):
    """MHMOE_TEST_MLFLOW is the address of an MLflow server; without it, only the files for W&B are checked."""
    server = os.environ.get("MHMOE_TEST_MLFLOW")
    tracking = {"wandb": "offline", "mlflow": server, "experiment": "kills", "group": project.name}
    harness.write_random_spec(project, train={"steps": 120}, tracking=tracking)
    run = harness.submit(project)
    harness.soak(project, run, kills=5, seed=3)
    wait_for_end(run)
    loss_by_step = {line[metrics.STEP]: line[metrics.LOSS] for line in history.read(run)}
    points = offline_history(run, "loss/training")
    assert (len(points), dict(points)) == (120, loss_by_step)
    if server:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=server)
        experiment = client.get_experiment_by_name("kills")
        [mlflow_run] = client.search_runs([experiment.experiment_id], f"tags.mhmoe_run = '{run.id}'")
        mlflow_points = client.get_metric_history(mlflow_run.info.run_id, "loss/training")
        assert [(point.step, point.value) for point in mlflow_points] == points
        assert mlflow_run.info.status == "FINISHED"
