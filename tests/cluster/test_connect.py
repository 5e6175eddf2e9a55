import http.server
import json
import socket
import threading

import pytest
import requests

from mhmoe_ray.cluster.connect import connect, normalised, start, uses_local_cluster
from mhmoe_ray.cluster.local import RECORD
from mhmoe_ray.cluster.tokens import own_token, token_file
from mhmoe_ray.errors import ClusterError, TokenError


@pytest.fixture
def as_stranger(local_cluster, tmp_path, monkeypatch):
    """Return the address of the local cluster, with the home folders of a user who did not start it.

    That user has no token of the cluster.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    return local_cluster.address


@pytest.fixture
def no_cluster(tmp_path, monkeypatch):
    """Set MHMOE_HOME to an empty folder, so that there is no local cluster."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))


@pytest.mark.ray
def test_connect_without_an_address_uses_the_local_cluster(local_cluster, monkeypatch):
    # This is an address of Ray's own protocol, not the URL of a dashboard, so it must be ignored.
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    connection = connect()
    assert connection.address == local_cluster.address
    assert connection.local
    assert connection.is_local_machine
    assert connect(local_cluster.address + "/") == connection
    assert start(1) == connection


@pytest.mark.ray
@pytest.mark.parametrize("path", ["/api/version", "/api/jobs/", "/nodes?view=summary", "/api/serve/applications/"])
def test_cluster_refuses_requests_without_its_token(local_cluster, path):
    assert requests.get(local_cluster.address + path, timeout=10).status_code == 401
    wrong_headers = {"Authorization": "Bearer wrong"}
    assert requests.get(local_cluster.address + path, headers=wrong_headers, timeout=10).status_code == 403


@pytest.mark.ray
def test_missing_or_wrong_token_is_explained(as_stranger, monkeypatch):
    with pytest.raises(TokenError, match="there is none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or"):
        connect(as_stranger)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(TokenError, match="it refused the token of RAY_AUTH_TOKEN; put the cluster's token"):
        connect(as_stranger)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(TokenError, match="RAY_AUTH_MODE=disabled keeps us from sending one"):
        connect(as_stranger)


@pytest.mark.ray
@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_user_with_the_token_can_connect(local_cluster, tmp_path, monkeypatch, variable):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file()))
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, local_cluster.address)
    connection = connect()
    assert connection.address == local_cluster.address
    assert not connection.local
    assert connection.is_local_machine


@pytest.mark.ray
def test_connect_ignores_proxies_of_the_environment(local_cluster, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert connect().token == own_token()


def test_no_local_cluster_is_one_line(no_cluster, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ClusterError, match="none runs; start it: mhmoe cluster up; or name a cluster"):
        connect()


def test_unreachable_address_is_one_line(no_cluster):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        closed_address = f"http://127.0.0.1:{s.getsockname()[1]}"
    with pytest.raises(ClusterError, match="nothing answers there"):
        connect(closed_address)
    with pytest.raises(ClusterError, match="the name of its host is not known here"):
        connect("http://no-such-host.invalid:8265")


@pytest.fixture
def foreign_address(no_cluster, tmp_path):
    """Record a local cluster of another machine in MHMOE_HOME, as if both machines shared it; return its address."""
    cluster = {"pid": 1, "address": "http://127.0.0.1:23456", "gcs_address": "", "cpus": 8, "host": "elsewhere"}
    (tmp_path / RECORD).write_text(json.dumps(cluster | {"folder": "/tmp/mhmoe-elsewhere"}))
    return cluster["address"]


def test_record_of_another_machines_cluster_blocks_only_its_own_address(foreign_address):
    assert not uses_local_cluster("http://head:8265")
    for address in ("http://127.0.0.1:1", "http://no-such-host.invalid:8265"):
        assert not uses_local_cluster(address)
        with pytest.raises(ClusterError, match=r"nothing answers there|is not known here"):
            connect(address)
    assert uses_local_cluster(foreign_address)
    with pytest.raises(ClusterError, match="it was started on elsewhere, which shares this home"):
        connect(foreign_address)


def test_another_kind_of_server_is_one_line(no_cluster):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ClusterError, match=r"not a Ray dashboard: it answers /api/version with status 404"):
                connect(f"127.0.0.1:{server.server_port}")
            with pytest.raises(ClusterError, match="no TLS connection"):
                connect(f"https://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Handler that logs nothing."""

    def log_message(self, *args):
        pass


@pytest.mark.ray
def test_port_of_ray_itself_is_no_dashboard(local_cluster):
    with pytest.raises(ClusterError, match="not a Ray dashboard: something there does not speak HTTP; give the dashb"):
        connect(local_cluster.gcs_address)


@pytest.mark.parametrize(
    "address",
    ["ray://host:10001", "auto", "local", "http://", "http://host:port", "http://host:99999", "ho st", "http://h?a=b"],
)
def test_malformed_address_is_one_line(address):
    with pytest.raises(ClusterError, match="not the URL of a Ray dashboard; give the dashboard's URL"):
        normalised(address)


def test_address_with_a_password_is_refused_without_showing_it():
    with pytest.raises(ClusterError, match="address of host: it holds a user name") as e:
        normalised("http://me:hunter2@host")
    assert "hunter2" not in str(e.value)


def test_addresses_are_normalised():
    assert normalised("host:8265") == "http://host:8265"
    assert normalised("https://host/ray/") == "https://host/ray"
