"""Tests of the rendered batch script of SLURM with stand-ins for SLURM's commands, and with a real Ray or without."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mhmoe_ray.render.slurm import batch_script
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import list_runs
from mhmoe_ray.spec import validate_section
from mhmoe_ray.spec.site import SiteSpec
from tests.cli.conftest import write_spec
from tests.conftest import USER_CLUSTER_VARIABLES
from tests.data.texts import write_corpus
from tests.support.watch import newest_run, step_of, wait_until

COMMANDS = {
    # This srun runs the command on this machine, whichever node the option -w names. It records the process as one of
    # the job's.
    "srun": """
while [ "${1#-}" != "$1" ]; do [ "$1" = -w ] && shift; shift; done
echo $$ >> "$FAKE/job"
[ "$1" = hostname ] && exec echo 127.0.0.1
exec "$@"
""",
    "scontrol": '[ "$1" = show ] && exec echo node0\necho "$@" >> "$FAKE/said"\n',
    "scancel": 'echo "$@" >> "$FAKE/said"\nkill $(cat "$FAKE/job") 2> /dev/null\n',
}


@pytest.fixture
def start_job(tmp_path):
    """Write the batch script of a site; return a function that starts it as SLURM does and returns the process."""
    fake = tmp_path / "bin"
    fake.mkdir()
    for name, text in COMMANDS.items():
        (fake / name).write_text(f"#!/bin/bash\n{text}")
        (fake / name).chmod(0o755)
    site = {"image": "x", "workers": {"cpus": 8, "memory_gib": 8, "max": 1}, "slurm": {"partition": "p", "nodes": 1}}
    loaded = validate_section(SiteSpec, site, "site")
    (tmp_path / "slurm.sh").write_text(batch_script(loaded, loaded.slurm))
    path = f"{fake}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if k not in USER_CLUSTER_VARIABLES}
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node0", "FAKE": str(tmp_path)}
    environment = {**inherited, **slurm, "PATH": path, "HOME": str(tmp_path), "MHMOE_HOME": str(tmp_path / "home")}

    def start():
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(
                ["bash", "slurm.sh", "spec.yaml"], cwd=tmp_path, env=environment, stdout=log, stderr=log
            )

    return start


@pytest.mark.ray
@pytest.mark.slow
def test_run_is_saved_before_the_time_limit_and_continued(tmp_path, start_job):
    write_corpus(tmp_path / "raw")
    spec = write_spec(tmp_path, train={"steps": 400, "checkpoint_every": 100, "validate_every": 100})
    # The storage is not the folder in which commands look for runs by default, so the script has to name a run by its
    # path.
    spec.write_text(spec.read_text().replace(f"storage: {tmp_path}/runs\n", f"storage: {tmp_path}/elsewhere/runs\n"))
    process = start_job()
    run = wait_until(lambda: list_runs(tmp_path / "elsewhere/runs") and newest_run(tmp_path / "elsewhere"), "the run")
    wait_until(lambda: step_of(run) >= 20, "step 20")
    assert [p.stat().st_mode & 0o777 for p in tmp_path.glob(".mhmoe-token-*")] == [0o600]
    ray = [word for pid in _living_pids(tmp_path) for word in psutil.Process(pid).cmdline() if "--temp-dir=" in word]
    folder = Path(ray[0].partition("=")[2])
    assert folder.is_dir()
    process.send_signal(signal.SIGUSR1)
    process.wait(120)
    stop_step = step_of(run)
    assert events.state(events.read(run)) == "stopped"
    assert f"requeue {os.getpid()}" in (tmp_path / "said").read_text()
    assert not list(tmp_path.glob(".mhmoe-token-*"))
    assert not folder.exists()

    job_pids = _living_pids(tmp_path)
    wait_until(lambda: not any(map(psutil.pid_exists, job_pids)), "the end of all of the job's processes")
    (tmp_path / "job").unlink()
    second_job = start_job()
    assert second_job.wait(240) == 0, (tmp_path / "log").read_text()[-2000:]
    assert [r.id for r in list_runs(tmp_path / "elsewhere/runs")] == [run.id]
    starts = [e["step"] for e in events.read(run) if e["event"] == "started"]
    assert starts == [0, stop_step]
    assert events.state(events.read(run)) == "finished"


# These stand-ins replace Ray and the commands of this package. Each start of a process that stays alive is recorded.
CLUSTER_COMMANDS = {
    "ray": 'echo $$ > "$FAKE/head"\nexec sleep 600\n',
    "mhmoe": """
case "$*" in
  *--watch) echo $$ > "$FAKE/watch"; exec sleep 600;;
  "cluster status"*) echo '{"nodes": 1}';;
  submit*) echo '{"path": "the-run"}';;
  stop*) echo "$@" >> "$FAKE/said";;
esac
""",
}


@pytest.fixture
def watched_job(tmp_path, start_job):
    """Start a job without a real Ray, and return its process when the script waits for the end of the run."""
    for name, text in CLUSTER_COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    process = start_job()
    wait_until((tmp_path / "watch").exists, "the watch")
    yield process
    process.kill()
    process.wait()
    for name in ("head", "watch"):
        with suppress(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), signal.SIGKILL)


def test_job_is_put_into_the_queue_again_if_the_head_ends(tmp_path, watched_job):
    os.kill(int((tmp_path / "head").read_text()), signal.SIGKILL)
    assert watched_job.wait(60) == 1
    assert "error: the head of the cluster has ended" in (tmp_path / "log").read_text()
    assert (tmp_path / "said").read_text().splitlines()[0] == f"requeue {os.getpid()}"
    watch = int((tmp_path / "watch").read_text())
    wait_until(lambda: not psutil.pid_exists(watch), "the end of the watch")


def test_run_is_stopped_and_job_put_into_the_queue_again_before_the_time_limit(tmp_path, watched_job):
    watched_job.send_signal(signal.SIGUSR1)
    assert watched_job.wait(60) == 128 + signal.SIGUSR1
    assert (tmp_path / "said").read_text().splitlines()[:2] == ["stop the-run", f"requeue {os.getpid()}"]


def _living_pids(folder):
    """Return the ids of the recorded processes of the job that still run."""
    return [pid for word in (folder / "job").read_text().split() if psutil.pid_exists(pid := int(word))]
