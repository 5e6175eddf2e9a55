"""`mhmoe serve update` where Serve already has the newest checkpoint's configuration, against a dashboard of the test's
own."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from mhmoe_ray.checkpoint.manifest import committed
from mhmoe_ray.serve.config import application_config
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import mhmoe


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, MIXTRAL)


@contextmanager
def board(run, *statuses):
    """Run a dashboard that reports these statuses, one at a time, and the last one again and again.

    Yield its address, and the list of checkpoints that have been deployed there.
    """
    [checkpoint] = committed(run)
    config = application_config("mhmoe", checkpoint, ServeSpec(), run.id)
    app = {"route_prefix": "/", "message": "no room", "deployments": {}, "deployed_app_config": config}
    left, deployed = [*statuses], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            told = {"version": "4", "ray_version": "2", "ray_commit": "", "session_name": "elsewhere"}
            if self.path.startswith("/nodes"):
                told = {"data": {"summary": [], "nodeLogicalResources": {}}}
            if self.path.startswith("/api/serve"):
                status = left.pop(0) if len(left) > 1 else left[0]
                http_options = {"host": "127.0.0.1", "port": 8000}
                told = {"http_options": http_options, "applications": {"mhmoe": {**app, "status": status}}}
            self.answer(told)

        def do_PUT(self):
            [application] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["applications"]
            deployed.append(application["args"]["checkpoint"])
            left[:] = ["RUNNING"]
            self.answer({})

        def answer(self, told):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

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


def update(folder, at, *words):
    return mhmoe(folder, "serve", "update", "--address", at, *words, MHMOE_HOME=str(folder))


def test_what_runs_is_left_alone_and_is_the_newest_only_where_that_was_looked_for(tmp_path, run):
    with board(run, "RUNNING") as (at, deployed):
        assert update(tmp_path, at).out == "step_00000007.1 is the newest checkpoint, and is served\n"
        assert update(tmp_path, at, "--checkpoint", "step_00000007.1").out == "step_00000007.1 is served\n"
    assert deployed == []


def test_what_is_being_deployed_is_waited_for(tmp_path, run):
    with board(run, "DEPLOYING", "DEPLOYING", "DEPLOYING", "RUNNING") as (at, deployed):
        updated = update(tmp_path, at)
    assert updated.out == "step_00000007.1 is the newest checkpoint, and is served\n"
    assert updated.err == "step_00000007.1 is being deployed already\n"
    with board(run, "DEPLOYING", "DEPLOYING", "DEPLOY_FAILED") as (at, again):
        assert update(tmp_path, at).code == 10
    assert deployed == again == []


def test_what_failed_is_deployed_again(tmp_path, run):
    [checkpoint] = committed(run)
    with board(run, "DEPLOY_FAILED") as (at, deployed):
        updated = update(tmp_path, at)
    assert (updated.code, updated.out) == (0, "serving step_00000007.1\n"), updated.err
    assert updated.err == "deploying step_00000007.1 again\n"
    assert deployed == [str(checkpoint)]
