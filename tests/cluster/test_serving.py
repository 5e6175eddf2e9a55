import dataclasses
import socket
from pathlib import Path

import pytest
import requests

from mhmoe_ray.cluster import serving
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.errors import ServeError

pytestmark = pytest.mark.ray
HOST = "127.0.0.1"


@pytest.fixture
def connection(local_cluster):
    return connect()


@pytest.fixture(scope="module")
def port():
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def _app(name, word):
    runtime_env = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    app = {"name": name, "route_prefix": f"/{name}", "import_path": "echo_app:build", "args": {"word": word}}
    return {**app, "runtime_env": runtime_env}


def _get(port, name):
    return requests.get(f"http://{HOST}:{port}/{name}", timeout=10)


def test_port_that_is_taken(connection):
    with socket.socket() as s:
        s.bind((HOST, 0))
        s.listen()
        taken = s.getsockname()[1]
        with pytest.raises(ServeError, match=f"application a: .*Failed to bind .*; correct it, or its address {HOST}"):
            serving.deploy(connection, _app("a", "x"), HOST, taken)
    assert serving.applications(connection) == []  # and Serve is not left with that port: the next test takes another


@pytest.mark.slow
def test_two_applications(connection, port):
    serving.deploy(connection, _app("a", "first"), HOST, port)
    serving.wait_until_running(connection, "a", 60)
    other = dataclasses.replace(connection, local=False)  # this one is sent our packages
    serving.deploy(other, _app("b", "other"), HOST, port)
    serving.wait_until_running(connection, "b", 60)
    assert [_get(port, name).text for name in "ab"] == ["first", "other"]

    serving.deploy(connection, _app("a", "second"), HOST, port)
    serving.deploy(connection, _app("c", "bad"), HOST, port)
    serving.wait_until_running(connection, "a", 60)
    assert [_get(port, name).text for name in "ab"] == ["second", "other"]

    with pytest.raises(ServeError, match=f"Serve listens on {HOST}:{port} already"):
        serving.deploy(connection, _app("d", "x"), HOST, port + 1)
    with pytest.raises(ServeError, match="application d: a answers at /a already"):
        serving.deploy(connection, {**_app("d", "x"), "route_prefix": "/a"}, HOST, port)

    with pytest.raises(ServeError, match="application c: ValueError: bad word; see its log"):
        serving.wait_until_running(connection, "c", 60)
    found = serving.applications(connection)
    assert [(a.name, a.status, a.url) for a in found] == [
        ("a", "RUNNING", f"http://{HOST}:{port}/a"),
        ("b", "RUNNING", f"http://{HOST}:{port}/b"),
        ("c", "DEPLOY_FAILED", f"http://{HOST}:{port}/c"),
    ]

    options = {"ray_actor_options": {"num_cpus": 100}, "graceful_shutdown_timeout_s": 1}
    serving.deploy(connection, {**_app("big", "x"), "deployments": [{"name": "Echo", **options}]}, HOST, port)
    with pytest.raises(ServeError, match=r"not running after 2 s: .*; wait, or check that the cluster has the CPUs"):
        serving.wait_until_running(connection, "big", 2)

    for name in ("big", "c", "b"):
        serving.remove(connection, name)
    with pytest.raises(ServeError, match="it is gone from the cluster"):
        serving.wait_until_running(connection, "b", 2)
    assert _get(port, "a").text == "second"
    assert _get(port, "b").status_code == 404
    with pytest.raises(ServeError, match="application b: there is no such application"):
        serving.remove(connection, "b")

    serving.remove(connection, "a")
    assert serving.applications(connection) == []
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((HOST, port))  # free again
