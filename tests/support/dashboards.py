"""Simulated dashboards of clusters."""

import http.server
import json
import threading
from contextlib import contextmanager

from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from mhmoe_ray.ray_compat import RAY_RELEASE
from mhmoe_ray.serving.config import application_config
from mhmoe_ray.spec import ServeSpec


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
            response = {"version": "4", "ray_version": f"{RAY_RELEASE}.9", "session_name": "elsewhere"}
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
