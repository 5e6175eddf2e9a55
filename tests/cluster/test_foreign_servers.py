"""Tests of servers that answer like a Ray dashboard at `/api/version` alone: errors are one line."""

import http.server
import json
import threading
import time
from contextlib import contextmanager

import pytest
import ray

from mhmoe_ray.cluster import dashboard, doctor, jobs, nodes, serving
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.errors import ClusterError, MhmoeError
from mhmoe_ray.ray_compat import RAY_RELEASE
from tests.cli.run import assert_one_line, mhmoe

VERSION = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "s"}
NODE = {"nodeId": "a", "nodeManagerHostname": "b", "resourcesTotal": {"CPU": 8.0}, "sessionDir": "/", "state": "ALIVE"}
NODES = {"data": {"summary": [{"raylet": NODE}], "nodeLogicalResources": {}}}


@contextmanager
def server(answer):
    """Run a server whose `answer` gets each request's handler and returns a status and a body; yield its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answer(self)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", self.path)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_):
            """Log nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running_server:
        thread = threading.Thread(target=running_server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running_server.server_port}"
        finally:
            running_server.shutdown()
            thread.join()


def answers(other_answer, **by_path):
    """Return an `answer` for `server`: JSON by the path's last word, and `other_answer` for all other paths."""
    known_values = {"version": VERSION, **by_path}

    def answer(handler):
        value = known_values.get(handler.path.split("?")[0].rpartition("/")[2])
        if handler.command == "GET" and value is not None:
            return 200, json.dumps(value).encode()
        return other_answer

    return answer


OTHER_ANSWERS = {
    "404": (404, b"{}"),
    "no JSON": (200, b"<html>"),
    "JSON of another kind": (200, b"[1]"),
    "a number": (200, b"1"),
    "no entries": (200, b"{}"),
    "empty entries": (200, b'{"data": null, "applications": null, "http_options": 1}'),
    "deep nesting": (200, b"[" * 100_000),
    "endless redirects": (302, b""),
}


@pytest.mark.parametrize("other_answer", OTHER_ANSWERS.values(), ids=OTHER_ANSWERS)
def test_wrong_answers_are_errors_of_the_cluster(other_answer, monkeypatch, tmp_path):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    with server(answers(other_answer)) as address:
        connection = Connection(address, False, True, None)
        requests = {
            "connect": lambda: connect(address),
            "nodes": lambda: nodes.free_nodes(connection, None),
            "interpreter": lambda: nodes.head_python(connection, {}),
            "applications": lambda: serving.applications(connection),
            "logs": lambda: jobs.logs(connection, "job"),
        }
        if other_answer[1] != b"{}":  # a cluster without jobs has an empty list
            requests["alive jobs"] = lambda: jobs.find_alive(connection, "key", "value")
        if other_answer[0] != 404:  # a dashboard answers so for a job that it does not know
            requests["job"] = lambda: jobs.info(connection, "job")
        assert [finding.level for finding in doctor.reach_findings(address)] == ["error"]
        for request in requests.values():
            with pytest.raises(MhmoeError, match=r"^(cluster http://127.0.0.1:\d+|job job): [^\n]+$"):
                request()


@pytest.mark.parametrize("summary", [{}, {"nodes": NODES}], ids=["no nodes", "nodes"])
def test_commands_show_wrong_answers_in_one_line(corpus, tmp_path, summary):
    with server(answers((200, b"[1]"), **summary)) as address:
        for words in (("submit", "spec.yaml", "--detach"), ("serve", "status")):
            result = mhmoe(corpus, *words, "--address", address, MHMOE_HOME=str(tmp_path / "home"))
            assert_one_line(result, 5, f"cluster {address}: not a Ray dashboard: ")


@pytest.mark.parametrize("version", [5, None, "new", ["2.60"]])
def test_version_of_another_kind_is_one_line(version, tmp_path):
    with server(answers((404, b""), version={**VERSION, "ray_version": version})) as address:
        result = mhmoe(tmp_path, "cluster", "status", "--address", address, MHMOE_HOME=str(tmp_path))
        assert_one_line(result, 5, "not a Ray dashboard")


def test_answer_that_comes_byte_by_byte_is_too_late():
    """The HTTP client's own timeout begins anew with each byte."""
    end = threading.Event()

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        deadline = time.monotonic() + 60
        while not end.wait(0.05) and time.monotonic() < deadline:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        return 200, b"{}"

    with server(answer) as address:
        try:
            with pytest.raises(ClusterError, match="no answer in time"):
                dashboard.get(address, "/nodes", None, seconds=0.3)
        finally:
            end.set()


@pytest.mark.parametrize(
    ("release", "level", "text"),
    [
        (f"{RAY_RELEASE}.9", "ok", f"Ray {RAY_RELEASE}.9, which fits Ray {ray.__version__} here"),
        ("2.1.0", "error", f"it runs Ray 2.1.0, and jobs of mhmoe need {RAY_RELEASE}"),
    ],
)
def test_cluster_may_differ_in_the_patch_of_ray_alone(corpus, tmp_path, monkeypatch, release, level, text):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "home"))
    with server(answers((404, b""), version={**VERSION, "ray_version": release}, nodes=NODES)) as address:
        [finding] = [finding for finding in doctor.reach_findings(address) if finding.check == "cluster"]
        assert (finding.level, text in finding.message) == (level, True)
        result = mhmoe(corpus, "submit", "spec.yaml", "--storage", str(tmp_path), "--detach", "--address", address)
    is_refused = level == "error"
    assert (text in result.err, bool(list(tmp_path.glob("tiny-*")))) == (is_refused, not is_refused), result
    if is_refused:
        assert_one_line(result, 5, text)
