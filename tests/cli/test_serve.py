"""`mhmoe serve deploy` of applications that do not start at once; tests/cli/test_runs.py sends requests to one that
does."""

import signal
import subprocess
from pathlib import Path

import pytest

from mhmoe_ray.cluster import serving
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.serve_removal import remove
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import assert_one_line, command, mhmoe
from tests.watch import ended_by_ctrl_c, of_kind, wait_until

pytestmark = pytest.mark.ray

RUNTIME_ENV = {"env_vars": {"WORD": "of the spec"}}


@pytest.fixture
def run(tmp_path):
    """Return a run whose spec names a runtime environment."""
    run = make_run(tmp_path, MIXTRAL)
    spec = run.spec()
    cluster = spec.cluster.model_copy(update={"runtime_env": RUNTIME_ENV})
    run.write_spec(spec.model_copy(update={"cluster": cluster}))
    return run


@pytest.fixture
def full(local_cluster, unused_port):
    """Deploy an application that takes all CPUs of the cluster, and yield the connection to that cluster."""
    connection = connect()
    all_of_them = {"name": "Echo", "ray_actor_options": {"num_cpus": local_cluster.cpus}}
    app = {"name": "full", "route_prefix": "/full", "import_path": "echo_app:build", "args": {"word": "x"}}
    app |= {"runtime_env": {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1] / "cluster")}}}
    serving.deploy(connection, {**app, "deployments": [all_of_them]}, "127.0.0.1", unused_port)
    serving.wait_until_running(connection, "full")
    yield connection
    remove(connection, "full")


@pytest.fixture
def breakable(tmp_path):
    """Return a run whose replicas cannot be constructed while a file exists, and that file.

    The file stands for a missing library or mount.
    """
    site, broken = tmp_path / "site", tmp_path / "broken"
    site.mkdir()
    lines = ["import os, sys", f"if os.path.exists({str(broken)!r}):", "    sys.modules['mhmoe_ray.serve.load'] = None"]
    (site / "sitecustomize.py").write_text("\n".join(lines))
    run = make_run(tmp_path, MIXTRAL)
    spec = run.spec()
    cluster = spec.cluster.model_copy(update={"runtime_env": {"env_vars": {"PYTHONPATH": str(site)}}})
    run.write_spec(spec.model_copy(update={"cluster": cluster}))
    return run, broken


@pytest.mark.slow
def test_what_failed_in_its_replicas_starts_anew_when_it_is_deployed_again(
    tmp_path, local_cluster, breakable, unused_port
):
    """Serve itself does nothing when it gets a configuration that it already has."""
    run, broken = breakable
    words = ("serve", "deploy", run.id, "--name", "weak", "--set", f"serve.port={unused_port}")
    broken.touch()
    try:
        failed = mhmoe(tmp_path, *words)
        assert (failed.code, "application weak: ModuleNotFoundError: import of mhmoe_ray.serve.load" in failed.err) == (
            10,
            True,
        )
        broken.unlink()
        served = mhmoe(tmp_path, *words)
        assert (served.code, served.out.startswith(f"serving {run.id} at ")) == (0, True), served.err
        [told] = mhmoe(tmp_path, "serve", "status", "--json").json()
        assert (told["name"], told["status"]) == ("weak", "RUNNING")
    finally:
        assert mhmoe(tmp_path, "serve", "down", "weak").code == 0


def test_who_stops_waiting_leaves_a_run_that_is_known_to_be_served(tmp_path, run, full, unused_port):
    deploying = subprocess.Popen(
        command("serve", "deploy", run.id, "--name", "late", "--set", f"serve.port={unused_port}"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: a test run in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert deploying.stderr.readline().startswith("deploying ")
        [event] = wait_until(lambda: of_kind(run, "served"), "the record")
        assert (event["application"], event["url"]) == ("late", f"http://127.0.0.1:{unused_port}/late")
        err = ended_by_ctrl_c(deploying)
        hint = "detached; Serve goes on. See: mhmoe serve status; to end it: mhmoe serve down late"
        assert (deploying.returncode, err.splitlines()[-1]) == (0, hint)
        assert serving.declared(full, "late")[0]["runtime_env"] == RUNTIME_ENV
        [served] = mhmoe(tmp_path, "status", run.id, "--json").json()["served"]
        assert (served["status"], served["url"]) == ("DEPLOYING", event["url"])
        assert_one_line(mhmoe(tmp_path, "rm", run.id, "--yes"), 7, "it is served at", "mhmoe serve down")
    finally:
        deploying.kill()
        assert mhmoe(tmp_path, "serve", "down", "late").code == 0
