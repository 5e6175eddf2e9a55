"""Applications of Ray Serve for tests: real ones, and a dashboard's reports of one."""

import http.server
import json
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import requests

from mhmoe_ray.cluster import serve_client
from tests.watch import LIMIT

HOST = "127.0.0.1"


def echo(name, word):
    """Return an entry of Serve's configuration for echo_app.py."""
    runtime_env = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    app = {"name": name, "route_prefix": f"/{name}", "import_path": "echo_app:build", "args": {"word": word}}
    return {**app, "runtime_env": runtime_env}


@contextmanager
def answering(paths):
    """Run a server on loopback; yield its port and the requests that it got, each as its path and whether it had a key.

    At a path with None it is too busy to answer.
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, "Authorization" in self.headers))
            answer = paths.get(self.path, {})
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


def building(message):
    """Return what a dashboard reports of an application that does not answer yet."""
    config = {"import_path": "mhmoe_ray.serve.app:build", "route_prefix": "/a", "args": {"checkpoint": "/mnt/c"}}
    app = {"route_prefix": None, "status": "DEPLOYING", "message": message, "deployments": {}}
    return {"http_options": {"host": HOST, "port": 8000}, "applications": {"a": {**app, "deployed_app_config": config}}}


def application_details(connection, name):
    return serve_client.serve_details(connection)["applications"][name]


def states(connection, name):
    deployments = application_details(connection, name)["deployments"].values()
    return sorted(replica["state"] for deployment in deployments for replica in deployment["replicas"])


def is_free(port):
    """Return whether the port is free again; Serve ends without waiting for its proxy's process."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError:
            return False
    return True


def ask(port, name):
    return requests.get(f"http://{HOST}:{port}/{name}", timeout=LIMIT)
