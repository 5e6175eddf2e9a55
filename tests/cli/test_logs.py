"""`mhmoe logs --rank N --follow` against a dashboard of the test's own, which streams without end as Ray's does."""

import http.server
import json
import threading

import pytest

from mhmoe_ray.cli import logs
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.specs import tiny_spec

RANK = {"rank": 0, "pid": 5, "began": 1.0, "host": "here", "node": "a1"}


@pytest.fixture
def board():
    """Yield a dashboard's address, its answer about the job, and the event it awaits before a worker's second line."""
    told, more, over = {"status": "RUNNING", "message": "", "end_time": None}, threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.path.startswith("/api/v0/logs/stream"):
                self.chunk(b"step 1\n")
                more.wait()
                self.chunk(b"step 2\n")
                over.wait()
            else:
                self.chunk(json.dumps(told).encode() if "/api/jobs/" in self.path else b"printed\n")
            self.chunk(b"")

        def chunk(self, content):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", told, more
        over.set()
        server.shutdown()
        thread.join()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ended", ["as its directory says", "killed, which its job alone tells"])
def test_who_follows_a_worker_has_all_its_lines_and_is_let_go_when_the_run_is_over(board, ended, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.1)
    address, told, more = board
    run = create_run(tiny_spec(tmp_path))
    add_attempt(run, Attempt("job-1", address, local=True))
    events.record(run, "started", workers=[RANK])
    lines = logs._of_rank(run, Connection(address, True, True, None), 0, follow=True)
    assert [next(lines), next(lines)] == ["printed", "step 1"]
    threading.Timer(1, more.set).start()  # it is looked for an end several times before that
    assert next(lines) == "step 2"
    if ended.startswith("killed"):
        told |= {"status": "FAILED", "end_time": 1}
    else:
        events.record(run, "finished", step=2)
    assert list(lines) == []
