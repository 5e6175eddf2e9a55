"""Helpers for tests of Ray Serve: the configuration of a real application, and simulated servers and reports."""

import http.server
import json
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import requests

from mhmoe_ray.cluster import serve_client
from tests.support.watch import LIMIT

HOST = "127.0.0.1"


def echo_config(name, word):
    """Return the entry of Serve's configuration for an application of echo_app.py.

    Args:
        name: The name of the application, which is its route too.
        word: The word that it answers with; its start fails if the word is "bad".
    """
    runtime_env = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    app = {"name": name, "route_prefix": f"/{name}", "import_path": "echo_app:build", "args": {"word": word}}
    return {**app, "runtime_env": runtime_env}


@contextmanager
def json_server(responses):
    """Run an HTTP server on loopback that answers GET requests with JSON.

    Yield its port and a list that collects the requests, each as its path and whether it had an `Authorization` header.

    Args:
        responses: The JSON response of each path, or None for a response with status 503; other paths have {}.
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, "Authorization" in self.headers))
            answer = responses.get(self.path, {})
            self.send_response(503 if answer is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, requests
        finally:
            server.shutdown()
            thread.join()


def deploying_report(message):
    """Return the JSON that a dashboard reports while it deploys a single application `a`, with a status message."""
    config = {"import_path": "mhmoe_ray.serving.app:build", "route_prefix": "/a", "args": {"checkpoint": "/mnt/c"}}
    app = {"route_prefix": None, "status": "DEPLOYING", "message": message, "deployments": {}}
    return {"http_options": {"host": HOST, "port": 8000}, "applications": {"a": {**app, "deployed_app_config": config}}}


def application_details(connection, name):
    """Return what the dashboard reports of one application of Serve."""
    return serve_client.serve_details(connection)["applications"][name]


def replica_states(connection, name):
    """Return the sorted states of all replicas of an application, such as RUNNING or STARTING."""
    deployments = application_details(connection, name)["deployments"].values()
    return sorted(replica["state"] for deployment in deployments for replica in deployment["replicas"])


def is_port_free(port):
    """Return whether a process could listen on a port of this machine now."""
    # Serve ends without waiting for the process of its proxy, which may hold the port for a while.
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError:
            return False
    return True


def request_application(port, name):
    """Send a GET request to the route of an application, and return the response."""
    return requests.get(f"http://{HOST}:{port}/{name}", timeout=LIMIT)
