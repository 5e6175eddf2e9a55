"""Tests of `mhmoe serve deploy` where the application does not start; tests/cli/test_runs.py has one that starts."""

import signal
import subprocess
from pathlib import Path

import pytest

from mhmoe_ray.cluster import serving
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.serve_removal import remove
from mhmoe_ray.cluster.submissions import record_settings
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import assert_one_line, command, mhmoe
from tests.support.watch import end_by_ctrl_c, events_of_kind

pytestmark = pytest.mark.ray

RUNTIME_ENV = {"env_vars": {"WORD": "of the spec"}}


def make_run_with_environment(folder, runtime_env):
    """Return a run whose spec has a runtime environment, as if this user had submitted it."""
    run = make_run(folder, MIXTRAL)
    spec = run.spec()
    spec = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"runtime_env": runtime_env})})
    run.write_spec(spec)
    record_settings(spec)
    return run


@pytest.fixture
def run(tmp_path, lane_home):
    """Return a run whose spec names a runtime environment."""
    return make_run_with_environment(tmp_path, RUNTIME_ENV)


@pytest.fixture
def full_cluster(local_cluster, unused_port):
    """Deploy an application that takes all CPUs of the local cluster, and yield the connection to that cluster."""
    connection = connect()
    deployment = {"name": "Echo", "ray_actor_options": {"num_cpus": local_cluster.cpus}}
    app = {"name": "full", "route_prefix": "/full", "import_path": "echo_app:build", "args": {"word": "x"}}
    app |= {"runtime_env": {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1] / "cluster")}}}
    serving.deploy(connection, {**app, "deployments": [deployment]}, "127.0.0.1", unused_port)
    serving.wait_until_running(connection, "full")
    yield connection
    remove(connection, "full")


@pytest.fixture
def breakable_run(tmp_path, lane_home):
    """Return a run and the path of a file; while a test lets that file exist, no replica of the run can start.

    The file stands for a missing library or mount.
    """
    site, failure_file = tmp_path / "site", tmp_path / "broken"
    site.mkdir()
    lines = [
        "import os, sys",
        f"if os.path.exists({str(failure_file)!r}):",
        "    sys.modules['mhmoe_ray.serving.load'] = None",
    ]
    (site / "sitecustomize.py").write_text("\n".join(lines))
    return make_run_with_environment(tmp_path, {"env_vars": {"PYTHONPATH": str(site)}}), failure_file


@pytest.mark.slow
def test_failed_application_starts_anew_when_it_is_deployed_again(tmp_path, local_cluster, breakable_run, unused_port):
    """Ray Serve ignores a configuration that it already has, so `deploy` has to change it."""
    run, failure_file = breakable_run
    words = ("serve", "deploy", run.id, "--name", "weak", "--set", f"serve.port={unused_port}")
    failure_file.touch()
    try:
        failed_result = mhmoe(tmp_path, *words)
        assert (
            failed_result.code,
            "application weak: ModuleNotFoundError: import of mhmoe_ray.serving.load" in failed_result.err,
        ) == (
            10,
            True,
        )
        failure_file.unlink()
        result = mhmoe(tmp_path, *words)
        assert (result.code, result.out.startswith(f"serving {run.id} at ")) == (0, True), result.err
        [application] = mhmoe(tmp_path, "serve", "status", "--json").json()
        assert (application["name"], application["status"]) == ("weak", "RUNNING")
    finally:
        assert mhmoe(tmp_path, "serve", "down", "weak").code == 0


def test_interrupted_deploy_leaves_a_record_of_the_application(tmp_path, run, full_cluster, unused_port):
    deploying = subprocess.Popen(
        command("serve", "deploy", run.id, "--name", "late", "--set", f"serve.port={unused_port}"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore SIGINT, and the child would inherit this, so Ctrl-C would not end it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert deploying.stderr.readline().startswith("deploying ")
        # From this line on, the command handles Ctrl-C.
        assert deploying.stderr.readline().startswith("waiting until it answers")
        [event] = events_of_kind(run, "served")
        assert (event["application"], event["url"]) == ("late", f"http://127.0.0.1:{unused_port}/late")
        err = end_by_ctrl_c(deploying)
        hint = "detached; Serve goes on. See: mhmoe serve status; to end it: mhmoe serve down late"
        assert (deploying.returncode, err.splitlines()[-1]) == (0, hint)
        assert serving.deployed_config(full_cluster, "late")[0]["runtime_env"] == RUNTIME_ENV
        [application] = mhmoe(tmp_path, "status", run.id, "--json").json()["served"]
        assert (application["status"], application["url"]) == ("DEPLOYING", event["url"])
        assert_one_line(mhmoe(tmp_path, "rm", run.id, "--yes"), 7, "it is served at", "mhmoe serve down")
    finally:
        deploying.kill()
        assert mhmoe(tmp_path, "serve", "down", "late").code == 0
