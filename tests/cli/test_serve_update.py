"""Tests of `mhmoe serve update` where Serve already has the configuration of the newest checkpoint.

The dashboard of the cluster is simulated.
"""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from mhmoe_ray.serving.config import application_config
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import mhmoe


@pytest.fixture
def run(tmp_path):
    """Return a finished run with one checkpoint, stored below `tmp_path`/runs."""
    return make_run(tmp_path, MIXTRAL)


@contextmanager
def dashboard(run, *statuses):
    """Run a simulated dashboard of a cluster that serves the run's checkpoint.

    Each request reports the next of `statuses` as the status of the application; the last one is repeated. After a
    deployment, the status is RUNNING. Yield the dashboard's address, and a list that collects the checkpoints that are
    deployed there.
    """
    [checkpoint] = committed_checkpoints(run)
    config = application_config("mhmoe", checkpoint, ServeSpec(), run.id)
    app = {"route_prefix": "/", "message": "no room", "deployments": {}, "deployed_app_config": config}
    remaining_statuses, deployed = [*statuses], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            response = {"version": "4", "ray_version": "2", "ray_commit": "", "session_name": "elsewhere"}
            if self.path.startswith("/nodes"):
                response = {"data": {"summary": [], "nodeLogicalResources": {}}}
            if self.path.startswith("/api/serve"):
                status = remaining_statuses.pop(0) if len(remaining_statuses) > 1 else remaining_statuses[0]
                http_options = {"host": "127.0.0.1", "port": 8000}
                response = {"http_options": http_options, "applications": {"mhmoe": {**app, "status": status}}}
            self.answer(response)

        def do_PUT(self):
            [application] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["applications"]
            deployed.append(application["args"]["checkpoint"])
            remaining_statuses[:] = ["RUNNING"]
            self.answer({})

        def answer(self, response):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(response).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", deployed
        finally:
            server.shutdown()
            thread.join()


def update(folder, address, *words):
    """Run `mhmoe serve update` with this cluster address, in a folder that is its MHMOE_HOME too."""
    return mhmoe(folder, "serve", "update", "--address", address, *words, MHMOE_HOME=str(folder))


def test_update_leaves_a_running_application_alone(tmp_path, run):
    with dashboard(run, "RUNNING") as (address, deployed):
        assert update(tmp_path, address).out == "step_00000007.1 is the newest checkpoint, and is served\n"
        assert update(tmp_path, address, "--checkpoint", "step_00000007.1").out == "step_00000007.1 is served\n"
    assert deployed == []


def test_update_waits_for_a_deployment_in_progress(tmp_path, run):
    with dashboard(run, "DEPLOYING", "DEPLOYING", "DEPLOYING", "RUNNING") as (address, deployed):
        updated = update(tmp_path, address)
    assert updated.out == "step_00000007.1 is the newest checkpoint, and is served\n"
    assert updated.err.splitlines()[0] == "step_00000007.1 is being deployed already"
    with dashboard(run, "DEPLOYING", "DEPLOYING", "DEPLOY_FAILED") as (address, later_deployed):
        assert update(tmp_path, address).code == 10
    assert deployed == later_deployed == []


def test_update_deploys_a_failed_application_again(tmp_path, run):
    [checkpoint] = committed_checkpoints(run)
    with dashboard(run, "DEPLOY_FAILED") as (address, deployed):
        updated = update(tmp_path, address)
    assert (updated.code, updated.out) == (0, "serving step_00000007.1\n"), updated.err
    assert updated.err.splitlines()[0] == "deploying step_00000007.1 again"
    assert deployed == [str(checkpoint)]
