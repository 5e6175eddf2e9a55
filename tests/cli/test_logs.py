"""Tests of `mhmoe logs --rank N` with a simulated dashboard, whose log streams do not end with the run."""

import http.server
import json
import threading

import pytest

from mhmoe_ray.api import logs
from mhmoe_ray.api.defaults import ignore_note
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.errors import RunError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.support.events import record
from tests.support.specs import tiny_spec

WORKER = {"rank": 0, "pid": 5, "began": 1.0, "host": "here", "node": "a1"}
REPLACEMENT = WORKER | {"pid": 6, "began": 2.0}


@pytest.fixture
def dashboard():
    """Run a simulated dashboard that streams the logs of a worker and of its replacement.

    Yield its address, its response about the job, which a test may change, and an event that a test sets to let the
    worker's second line come. Then the worker's stream breaks if the response about the job has the key `is_node_lost`.
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
            if self.path.startswith("/api/v0/logs/stream") and f"pid={REPLACEMENT['pid']}&" in self.path:
                self.chunk(b"step 3\n")
                end_event.wait()
            elif self.path.startswith("/api/v0/logs/stream"):
                self.chunk(b"step 1\n")
                second_line_event.wait()
                self.chunk(b"step 2\n")
                if "is_node_lost" in job_info:
                    self.close_connection = True
                    return
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


@pytest.fixture
def run(dashboard, tmp_path, monkeypatch):
    """Return a run whose first attempt has a worker on the simulated dashboard, and shorten `OUTCOME_CHECK_SECONDS`."""
    monkeypatch.setattr(logs, "OUTCOME_CHECK_SECONDS", 0.1)
    run = create_run(tiny_spec(tmp_path))
    add_attempt(run, Attempt("job-1", dashboard[0], local=True))
    events.record(run, "submitted", attempt=1)
    record(run, "started", workers=[WORKER])
    return run


def worker_log(run, address, on_note=ignore_note):
    """Return the followed log of the worker of rank 0."""
    return logs._worker_log(run, Connection(address, True, True, None), 0, True, on_note)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end_cause", ["as its directory says", "killed, which its job alone tells"])
def test_follower_of_a_worker_gets_all_lines_and_ends_with_the_run(dashboard, run, end_cause):
    address, job_info, second_line_event = dashboard
    lines = worker_log(run, address)
    assert [next(lines), next(lines)] == ["printed", "step 1"]
    # The second line comes after a second. Until then, the command checks several times whether the run is over.
    threading.Timer(1, second_line_event.set).start()
    assert next(lines) == "step 2"
    if end_cause.startswith("killed"):
        job_info |= {"status": "FAILED", "end_time": 1}
    else:
        events.record(run, "finished", step=2)
    assert list(lines) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_node_lost", [False, True])
def test_follower_of_a_worker_goes_on_with_the_process_that_replaces_it(dashboard, run, is_node_lost):
    address, job_info, second_line_event = dashboard
    if is_node_lost:
        job_info["is_node_lost"] = True
    second_line_event.set()
    notes = []
    lines = worker_log(run, address, notes.append)
    assert [next(lines), next(lines), next(lines)] == ["printed", "step 1", "step 2"]
    record(run, "lost")
    threading.Timer(1, record, (run, "started"), {"workers": [REPLACEMENT]}).start()
    assert [next(lines), next(lines)] == ["printed", "step 3"]
    events.record(run, "finished", step=3)
    assert list(lines) == []
    lost_log_notes = [note for note in notes if "its log has ended early (cluster http" in note]
    assert len(lost_log_notes) == is_node_lost
    assert [note for note in notes if note not in lost_log_notes] == [
        "rank 0: process 5 on here",
        "rank 0: process 6 on here",
    ]


def test_worker_of_an_earlier_attempt_is_not_taken_for_one_of_the_newest(dashboard, run):
    events.record(run, "finished", step=2)
    events.record(run, "submitted", attempt=2)
    with pytest.raises(RunError, match="its workers have not started yet; see the log of its job: `mhmoe logs tiny-"):
        worker_log(run, dashboard[0])
