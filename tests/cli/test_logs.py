"""Test of `mhmoe logs --rank N --follow` with a simulated dashboard, whose log stream does not end with the run."""

import http.server
import json
import threading

import pytest

from mhmoe_ray.api import logs
from mhmoe_ray.api.defaults import ignore_note
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.specs import tiny_spec

WORKER = {"rank": 0, "pid": 5, "began": 1.0, "host": "here", "node": "a1"}


@pytest.fixture
def dashboard():
    """Run a simulated dashboard that streams the log of a worker, and control it.

    Yield its address, its response about the job, which a test may change, and an event that a test sets to let the
    worker's second line come.
    """
    job_info, second_line_event, end_event = (
        {"status": "RUNNING", "message": "", "end_time": None},
        threading.Event(),
        threading.Event(),
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.path.startswith("/api/v0/logs/stream"):
                self.chunk(b"step 1\n")
                second_line_event.wait()
                self.chunk(b"step 2\n")
                end_event.wait()
            else:
                self.chunk(json.dumps(job_info).encode() if "/api/jobs/" in self.path else b"printed\n")
            self.chunk(b"")

        def chunk(self, content):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", job_info, second_line_event
        end_event.set()
        server.shutdown()
        thread.join()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end_cause", ["as its directory says", "killed, which its job alone tells"])
def test_follower_of_a_worker_gets_all_lines_and_ends_with_the_run(dashboard, end_cause, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "OUTCOME_CHECK_SECONDS", 0.1)
    address, job_info, second_line_event = dashboard
    run = create_run(tiny_spec(tmp_path))
    add_attempt(run, Attempt("job-1", address, local=True))
    events.record(run, "started", workers=[WORKER])
    lines = logs._worker_log(run, Connection(address, True, True, None), 0, True, ignore_note)
    assert [next(lines), next(lines)] == ["printed", "step 1"]
    # The second line comes after a second. Until then, the command checks several times whether the run is over.
    threading.Timer(1, second_line_event.set).start()
    assert next(lines) == "step 2"
    if end_cause.startswith("killed"):
        job_info |= {"status": "FAILED", "end_time": 1}
    else:
        events.record(run, "finished", step=2)
    assert list(lines) == []
