"""Sweeps as a user starts them, on a real cluster, with processes that are really killed."""

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
from tests.watch import started, step_of, wait_until

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
    """Start a local cluster with room for two runs at a time, and yield it."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "home"))
    try:
        yield start_local(10)
    finally:
        stop_local()


def write_sweep(folder, **keys):
    sweep = {
        "name": "heads",
        "sizes": {"small": {"spec": "spec.yaml"}, "large": {"spec": "spec.yaml", "set": {"train.steps": 40}}},
        "runs": {"dense": DENSE, "h1": ONE_HEAD, "h2": TWO_HEADS},
        "concurrent": 1,
        **keys,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))


def drivers(project):
    """Return the processes of the jobs that start the runs."""
    sweeps = [SweepDir(folder) for folder in (project / "runs/sweeps").glob("*")]
    jobs = {sweep.order(name).job for sweep in sweeps for name in sweep.orders()}
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or ()
        if "mhmoe_ray.sweep.job" in line and jobs & set(line):
            found.append(process)
    return found


def test_a_dry_run_shows_every_variant_and_starts_nothing(project):
    write_sweep(project, seeds=[0, 1], grid={"train.lr": [0.001, 0.002]})
    shown = mhmoe(project, "sweep", "sweep.yaml", "--size", "large", "--dry-run")
    assert shown.code == 0, shown.err
    assert "6 variants x 2 seeds = 12 runs, 1 at a time" in shown.out
    [h2] = [line.split() for line in shown.out.splitlines() if line.startswith("h2-lr-0-002")]
    assert h2[1:5] == ["2", "4", "2", "24"]
    few = mhmoe(project, "sweep", "sweep.yaml", "--only", "dense-lr-0-001,h2-lr-0-002", "--seeds", "1", "--dry-run")
    assert "2 variants x 1 seeds = 2 runs" in few.out
    assert not (project / "runs").exists()
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml", "--size", "huge"), 3, "choose from small, large")
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml", "--only", "h3"), 3, "choose from dense-lr-0-001, ")
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml", "--show"), 7, "it was never started")
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml", "--stop"), 7, "it was never started")
    (project / "raw").rename(project / "gone")
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml"), 4, "source web", "there is no folder")
    assert not (project / "runs").exists()


@pytest.mark.ray
def test_a_sweep_runs_all_variants_and_the_same_command_adds_what_is_new(project, local_cluster):
    shutil.copytree(project / "raw", project / "torn")
    [file, *_] = sorted((project / "torn").rglob("*.jsonl"))
    with file.open("a") as f:
        f.write('{"text": ')
    torn = {**DENSE, "data.sources.web.path": "torn", "data.prepared": "of-torn"}
    wanting = {**DENSE, "data.sources.web.max_epochs": 0.01}  # more text than there is
    write_sweep(project, runs={"torn": torn, "wrong": wanting})
    first = mhmoe(project, "sweep", "sweep.yaml")
    assert_one_line_after_progress(first, 4, file.name)  # what the job could not prepare, after the others' turn
    [run] = list_runs(project / "runs")
    assert (run.name, events.state(events.events(run))) == ("heads-wrong-s0", "failed")
    write_sweep(project, runs={"wrong": wanting, "h1": ONE_HEAD})
    again = mhmoe(project, "sweep", "sweep.yaml")
    assert_one_line_after_progress(again, 9, "wrong-s0 failed")
    wrong = sweep_dir(project / "runs", "heads-small").runs()["wrong-s0"]
    assert [e["event"] for e in events.events(wrong)].count("submitted") == 2  # what failed is tried again
    # What was started before stays in the table, and what is finished stays finished.
    write_sweep(project, runs={"h1": ONE_HEAD})
    rows = {row["variant"]: row for row in mhmoe(project, "sweep", "sweep.yaml", "--show", "--json").json()}
    assert {name: row["states"] for name, row in rows.items()} == {"h1": {"finished": 1}, "wrong": {"failed": 1}}
    runs = sweep_dir(project / "runs", "heads-small").runs()
    assert len(started(runs["h1-s0"])) == 1
    loss = history.last(runs["h1-s0"])[metrics.VAL_LOSS]
    assert rows["h1"]["losses"] == {"0": loss}
    assert rows["wrong"]["parameters_ratio"] == 1 < rows["h1"]["parameters_ratio"]
    # On a terminal it is drawn; what is finished is not trained again, nor asked for at a cluster that is gone.
    for run in runs.values():
        state = json.loads(run.attempts_file.read_text())
        state["attempts"][-1]["address"] = "http://127.0.0.1:1"
        run.attempts_file.write_text(json.dumps(state))
    words = command("sweep", "sweep.yaml", "--only", "h1")
    drawn = pexpect.spawn(words[0], words[1:], cwd=project, dimensions=(40, 80), encoding="utf-8")
    drawn.expect(r"runs .*1/1", timeout=120)
    drawn.expect("1 finished", timeout=120)
    drawn.expect(pexpect.EOF, timeout=120)
    drawn.close()
    assert drawn.exitstatus == 0
    assert len(started(runs["h1-s0"])) == 1
    assert not list(project.rglob("pwned"))
    assert not list(Path.cwd().glob("pwned"))
    write_sweep(project, runs={"h1": {**ONE_HEAD, "train.lr": 0.001}})
    assert_one_line(mhmoe(project, "sweep", "sweep.yaml"), 3, "run h1-s0 was started with another spec: train")


def assert_one_line_after_progress(result, code, *parts):
    assert result.code == code, result
    assert "Traceback" not in result.out + result.err
    assert all(part in result.err.splitlines()[-1] for part in parts), result.err


@pytest.mark.slow
@pytest.mark.ray
def test_twelve_runs_survive_the_death_of_the_sweeps_job_and_of_workers(project, wide_cluster):
    write_sweep(project, seeds=[0, 1, 2, 3])
    follower = subprocess.Popen(
        command("sweep", "sweep.yaml"), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    place = sweep_dir(project / "runs", "heads-small")
    wait_until(lambda: place.exists and len(place.runs()) >= 4, "the fourth run", 300)
    done = {name: started(run) for name, run in place.runs().items() if events.state(events.events(run)) == "finished"}
    [driver] = drivers(project)
    driver.kill()
    victim = wait_until(lambda: running_worker(place, done), "a worker to end")
    os.kill(victim, signal.SIGKILL)
    out, err = follower.communicate(timeout=500)
    assert follower.returncode == 0, err
    assert "the job that starts the runs has ended; it is started again" in err
    assert len(place.orders()) == 2
    assert out.count("4 finished") == 3
    runs = place.runs()
    assert len(runs) == len({run.id for run in runs.values()}) == len(list_runs(project / "runs")) == 12
    assert all(step_of(run) == 20 for run in runs.values())
    # What was finished was not touched, and the victim's run went on.
    assert {name: started(runs[name]) for name in done} == done
    assert sum(len(started(run)) for run in runs.values()) == 13
    began = time.monotonic()
    assert mhmoe(project, "sweep", "sweep.yaml").code == 0
    assert time.monotonic() - began < 60
    assert sum(len(started(run)) for run in runs.values()) == 13


def running_worker(place, done):
    """Return the process id of a worker that trains a run other than those in `done`, or None."""
    for name, run in place.runs().items():
        if name not in done and events.state(events.events(run)) == "running" and 0 < step_of(run) < 18:
            return started(run)[-1]["workers"][0]["pid"]
    return None


@pytest.mark.slow
@pytest.mark.ray
def test_a_stopped_sweep_starts_no_more_and_goes_on_where_it_was(project, local_cluster):
    write_sweep(project, runs={"dense": {**DENSE, "train.steps": 400}, "h1": ONE_HEAD})
    follower = subprocess.Popen(
        command("sweep", "sweep.yaml"), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    place = sweep_dir(project / "runs", "heads-small")
    run = wait_until(lambda: place.exists and place.runs().get("dense-s0"), "the first run")
    wait_until(lambda: step_of(run) >= 5, "step 5")
    stopped = mhmoe(project, "sweep", "sweep.yaml", "--stop")
    assert stopped.code == 0, stopped.err
    assert "dense-s0: stopping after a checkpoint" in stopped.err
    follower.communicate(timeout=120)  # it does not start the job again
    assert len(place.orders()) == 1
    wait_until(lambda: events.state(events.events(run)) == "stopped", "the end of the first run")
    assert list(place.runs()) == ["dense-s0"]
    reached = step_of(run)
    assert mhmoe(project, "sweep", "sweep.yaml").code == 0
    assert started(run)[-1]["step"] == reached < 400 == step_of(run)
    assert step_of(place.runs()["h1-s0"]) == 20


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_is_stopped_stays_so_though_another_job_of_the_sweep_had_started_it(project, local_cluster):
    write_sweep(project, runs={"dense": {**DENSE, "train.steps": 4000}})
    follower = subprocess.Popen(
        command("sweep", "sweep.yaml"), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    place = sweep_dir(project / "runs", "heads-small")
    run = wait_until(lambda: place.exists and place.runs().get("dense-s0"), "the run")
    wait_until(lambda: step_of(run) >= 5, "step 5")
    [driver] = drivers(project)
    driver.kill()
    wait_until(lambda: len(place.orders()) == 2, "the second job")
    time.sleep(15)  # so that it has seen the run alive
    assert mhmoe(project, "stop", run.id).code == 0
    out, err = follower.communicate(timeout=120)
    assert follower.returncode == 0, err
    assert "1 stopped" in out
    assert len(started(run)) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_on_s3_is_trained_shown_and_found_finished(project, s3, wide_cluster):
    query, _ = s3  # whose credentials the cluster, started after it, has
    storage = f"s3://bucket/sweeps?{query}"
    write_sweep(project, runs={"dense": DENSE, "h1": ONE_HEAD})
    words = ("sweep", "sweep.yaml", "--set", f"storage={storage}")
    done = mhmoe(project, *words)
    assert done.code == 0, done.err
    place = sweep_dir(location(storage), "heads-small")
    assert {name: len(started(run)) for name, run in place.runs().items()} == {"dense-s0": 1, "h1-s0": 1}
    rows = mhmoe(project, *words, "--show", "--json").json()
    assert [row["states"] for row in rows] == [{"finished": 1}] * 2
    again = mhmoe(project, *words)
    assert again.code == 0, again.err
    assert {name: len(started(run)) for name, run in place.runs().items()} == {"dense-s0": 1, "h1-s0": 1}
    assert not (project / "runs").exists()
    page = mhmoe(project, "report", "heads-small", "--storage", storage, "--to", "report")
    assert page.code == 0, page.err
