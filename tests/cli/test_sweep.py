"""Tests of `mhmoe sweep`, most of them on a real cluster, some with processes that are killed."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pexpect
import psutil
import pytest
import yaml

from mhmoe_ray.cluster.local import start_local, stop_local
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import list_runs
from mhmoe_ray.runs.sweeps import SweepDir, sweep_dir
from mhmoe_ray.storage import location
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, command, mhmoe
from tests.data.texts import write_corpus
from tests.support.watch import start_events, step_of, wait_until

DENSE = {"model.moe": None}
ONE_HEAD = {"model.moe.heads": 1, "model.moe.top_k": 1, "model.moe.d_expert": 48}
TWO_HEADS = {"model.moe.heads": 2}


@pytest.fixture
def project(tmp_path) -> Path:
    """Return a project folder whose name has characters that a shell would interpret."""
    folder = tmp_path / "it's $(touch pwned); a & b"
    write_corpus(folder / "raw")
    write_spec(folder, cluster={"workers": 1, "ep": 1}, train={"steps": 20})
    return folder


@pytest.fixture
def wide_cluster(tmp_path, monkeypatch):
    """Start a local cluster of 10 CPUs, which has room for two runs at a time, and yield it; stop it at the end."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "home"))
    try:
        yield start_local(10)
    finally:
        stop_local()


def write_sweep(folder, **keys):
    """Write a sweep of three variants and two sizes to `folder`/sweep.yaml; `keys` replaces or adds top-level keys."""
    sweep = {
        "name": "heads",
        "sizes": {"small": {"spec": "spec.yaml"}, "large": {"spec": "spec.yaml", "set": {"train.steps": 40}}},
        "runs": {"dense": DENSE, "h1": ONE_HEAD, "h2": TWO_HEADS},
        "concurrent": 1,
        **keys,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))


def driver_processes(project):
    """Return the living processes of the jobs that start the runs of the project's sweeps."""
    sweeps = [SweepDir(folder) for folder in (project / "runs/sweeps").glob("*")]
    jobs = {sweep.read_order(name).job for sweep in sweeps for name in sweep.order_names()}
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or ()
        if "mhmoe_ray.sweep.job" in line and jobs & set(line):
            processes.append(process)
    return processes


def test_dry_run_shows_every_variant_and_starts_no_run(project):
    write_sweep(project, seeds=[0, 1], grid={"train.lr": [0.001, 0.002]})
    result = mhmoe(project, "sweep", "sweep.yaml", "--size", "large", "--dry-run")
    assert result.code == 0, result.err
    assert "6 variants x 2 seeds = 12 runs, 1 at a time" in result.out
    [h2] = [line.split() for line in result.out.splitlines() if line.startswith("h2-lr-0-002")]
    assert h2[1:5] == ["2", "4", "2", "24"]
    selected_result = mhmoe(
        project, "sweep", "sweep.yaml", "--only", "dense-lr-0-001,h2-lr-0-002", "--seeds", "1", "--dry-run"
    )
    assert "2 variants x 1 seeds = 2 runs" in selected_result.out
    assert not (project / "runs").exists()
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml", "--size", "huge"), 3, "choose from small, large")
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml", "--only", "h3"), 3, "choose from dense-lr-0-001, ")
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml", "--show"), 7, "it was never started")
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml", "--stop"), 7, "it was never started")
    (project / "raw").rename(project / "gone")
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml"), 4, "source web", "there is no file or folder")
    assert not (project / "runs").exists()


@pytest.mark.ray
def test_sweep_runs_all_variants_and_repeating_it_adds_new_ones(project, local_cluster):
    shutil.copytree(project / "raw", project / "torn")
    [file, *_] = sorted((project / "torn").rglob("*.jsonl"))
    with file.open("a") as f:
        f.write('{"text": ')
    torn_variant = {**DENSE, "data.sources.web.path": "torn", "data.prepared": "of-torn"}
    # This variant needs more text than its source has, so its run fails.
    impossible_variant = {**DENSE, "data.sources.web.max_epochs": 0.01}
    write_sweep(project, runs={"torn": torn_variant, "h1": ONE_HEAD})
    first_result = mhmoe(project, "sweep", "sweep.yaml")
    # The data of one run cannot be prepared. The other run is trained nevertheless.
    assert_one_line_after_progress(first_result, 4, file.name)
    [run] = list_runs(project / "runs")
    assert (run.name, events.state(events.read(run))) == ("heads-h1-s0", "finished")
    write_sweep(project, runs={"wrong": impossible_variant, "h1": ONE_HEAD})
    second_result = mhmoe(project, "sweep", "sweep.yaml")
    assert_one_line_after_progress(second_result, 9, "wrong-s0 failed")
    # A run that the file no longer has stays in the table, and a finished run stays finished.
    write_sweep(project, runs={"h1": ONE_HEAD})
    rows = {row["variant"]: row for row in mhmoe(project, "sweep", "sweep.yaml", "--show", "--json").json()}
    assert {name: row["states"] for name, row in rows.items()} == {"h1": {"finished": 1}, "wrong": {"failed": 1}}
    runs = sweep_dir(project / "runs", "heads-small").runs()
    assert len(start_events(runs["h1-s0"])) == 1
    loss = history.last_line(runs["h1-s0"])[metrics.VAL_LOSS]
    assert rows["h1"]["losses"] == {"0": loss}
    assert rows["wrong"]["parameters_ratio"] == 1 < rows["h1"]["parameters_ratio"]
    # In a terminal, the command shows how many runs are over. It neither trains finished runs again nor asks their
    # cluster, so it succeeds although the address of that cluster is now a wrong one.
    for run in runs.values():
        state = json.loads(run.attempts_file.read_text())
        state["attempts"][-1]["address"] = "http://127.0.0.1:1"
        run.attempts_file.write_text(json.dumps(state))
    words = command("sweep", "sweep.yaml", "--only", "h1")
    terminal = pexpect.spawn(words[0], words[1:], cwd=project, dimensions=(40, 80), encoding="utf-8")
    terminal.expect("training runs: 1 of 1 are over", timeout=120)
    terminal.expect("1 finished", timeout=120)
    terminal.expect(pexpect.EOF, timeout=120)
    terminal.close()
    assert terminal.exitstatus == 0
    assert len(start_events(runs["h1-s0"])) == 1
    assert not list(project.rglob("pwned"))
    assert not list(Path.cwd().glob("pwned"))
    write_sweep(project, runs={"h1": {**ONE_HEAD, "train.lr": 0.001}})
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml"), 3, "run h1-s0 was started with another spec: train")


def assert_one_line_after_progress(result, code, *parts):
    """Assert a command's exit code, that its last line of standard error has all `parts`, and no traceback."""
    assert result.code == code, result
    assert "Traceback" not in result.out + result.err
    assert all(part in result.err.splitlines()[-1] for part in parts), result.err


@pytest.mark.slow
@pytest.mark.ray
def test_sweep_survives_the_death_of_its_job_and_of_workers(project, wide_cluster):
    write_sweep(project, seeds=[0, 1, 2, 3])
    follower = subprocess.Popen(
        command("sweep", "sweep.yaml"), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    directory = sweep_dir(project / "runs", "heads-small")
    wait_until(lambda: directory.exists and len(directory.runs()) >= 4, "the fourth run", 300)
    finished_starts = {
        name: start_events(run)
        for name, run in directory.runs().items()
        if events.state(events.read(run)) == "finished"
    }
    [driver] = driver_processes(project)
    driver.kill()
    worker_pid = wait_until(lambda: running_worker(directory, finished_starts), "a worker to end")
    os.kill(worker_pid, signal.SIGKILL)
    out, err = follower.communicate(timeout=500)
    assert follower.returncode == 0, err
    assert "the job that starts the runs has ended; it is started again" in err
    assert len(directory.order_names()) == 2
    assert out.count("4 finished") == 3
    runs = directory.runs()
    assert len(runs) == len({run.id for run in runs.values()}) == len(list_runs(project / "runs")) == 12
    assert all(step_of(run) == 20 for run in runs.values())
    # The 12 runs have 13 starts: finished runs did not start again, and only the run of the killed worker started
    # twice.
    assert {name: start_events(runs[name]) for name in finished_starts} == finished_starts
    assert sum(len(start_events(run)) for run in runs.values()) == 13
    start_time = time.monotonic()
    assert mhmoe(project, "sweep", "sweep.yaml").code == 0
    assert time.monotonic() - start_time < 60
    assert sum(len(start_events(run)) for run in runs.values()) == 13


def running_worker(directory, finished_starts):
    """Return the process id of a worker that is in the midst of training a run; None if there is none.

    Runs whose names are in `finished_starts` do not count.
    """
    for name, run in directory.runs().items():
        if name not in finished_starts and events.state(events.read(run)) == "running" and 0 < step_of(run) < 18:
            return start_events(run)[-1]["workers"][0]["pid"]
    return None


@pytest.mark.slow
@pytest.mark.ray
def test_stopped_sweep_starts_no_more_runs_and_continues_later(project, local_cluster):
    write_sweep(project, runs={"dense": {**DENSE, "train.steps": 400}, "h1": ONE_HEAD})
    follower = subprocess.Popen(
        command("sweep", "sweep.yaml"), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    directory = sweep_dir(project / "runs", "heads-small")
    run = wait_until(lambda: directory.exists and directory.runs().get("dense-s0"), "the first run")
    wait_until(lambda: step_of(run) >= 5, "step 5")
    stop_result = mhmoe(project, "sweep", "sweep.yaml", "--stop")
    assert stop_result.code == 0, stop_result.err
    assert "dense-s0: stopping after a checkpoint" in stop_result.err
    # The command that follows the sweep must end, and it must not start the job again.
    follower.communicate(timeout=120)
    assert len(directory.order_names()) == 1
    wait_until(lambda: events.state(events.read(run)) == "stopped", "the end of the first run")
    assert list(directory.runs()) == ["dense-s0"]
    stopped_step = step_of(run)
    assert mhmoe(project, "sweep", "sweep.yaml").code == 0
    assert start_events(run)[-1]["step"] == stopped_step < 400 == step_of(run)
    assert step_of(directory.runs()["h1-s0"]) == 20


@pytest.mark.slow
@pytest.mark.ray
def test_stopped_run_stays_stopped_after_a_restart_of_the_sweeps_job(project, local_cluster):
    write_sweep(project, runs={"dense": {**DENSE, "train.steps": 4000}})
    follower = subprocess.Popen(
        command("sweep", "sweep.yaml"), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    directory = sweep_dir(project / "runs", "heads-small")
    run = wait_until(lambda: directory.exists and directory.runs().get("dense-s0"), "the run")
    wait_until(lambda: step_of(run) >= 5, "step 5")
    [driver] = driver_processes(project)
    driver.kill()
    wait_until(lambda: len(directory.order_names()) == 2, "the second job")
    # Before the test stops the run, the second job must have seen that the run is alive, so give it time.
    time.sleep(15)
    assert mhmoe(project, "stop", run.id).code == 0
    out, err = follower.communicate(timeout=120)
    assert follower.returncode == 0, err
    assert "1 stopped" in out
    assert len(start_events(run)) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_sweep_on_s3_is_trained_and_found_finished(project, s3, wide_cluster):
    # The cluster has the credentials of the S3 server, because it was started after the fixture `s3` had set them.
    query, _ = s3
    storage = f"s3://bucket/sweeps?{query}"
    write_sweep(project, runs={"dense": DENSE, "h1": ONE_HEAD})
    words = ("sweep", "sweep.yaml", "--set", f"storage={storage}")
    result = mhmoe(project, *words)
    assert result.code == 0, result.err
    directory = sweep_dir(location(storage), "heads-small")
    assert {name: len(start_events(run)) for name, run in directory.runs().items()} == {"dense-s0": 1, "h1-s0": 1}
    rows = mhmoe(project, *words, "--show", "--json").json()
    assert [row["states"] for row in rows] == [{"finished": 1}] * 2
    second_result = mhmoe(project, *words)
    assert second_result.code == 0, second_result.err
    assert {name: len(start_events(run)) for name, run in directory.runs().items()} == {"dense-s0": 1, "h1-s0": 1}
    assert not (project / "runs").exists()
    page = mhmoe(project, "report", "heads-small", "--storage", storage, "--to", "report")
    assert page.code == 0, page.err
