"""Tests of the queue of metrics for a tracking server."""

import logging
from threading import Event

import pytest

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train.telemetry import tracker
from mhmoe_ray.train.telemetry.tracker import QueuedTracker, TrackingError
from tests.support.events import LINE


class Server:
    """Tracking server in memory, whose first requests fail, or whose every call waits for an event."""

    name = "a server"

    def __init__(self, steps=(), failures=0, answers=None):
        self.steps, self.failures, self.answers = list(steps), failures, answers
        self.end_event = Event()

    def connect(self):
        if self.answers:
            self.answers.wait()
        return max(self.steps, default=0)

    def send(self, rows):
        if self.failures:
            self.failures -= 1
            raise TrackingError("503 away")
        self.steps += [row.step for row in rows]

    def link_checkpoint(self, checkpoint):
        pass

    def end(self, end_status):
        self.end_event.set()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a run whose metrics.jsonl has seven steps; trackers send often."""
    monkeypatch.setattr(tracker, "SEND_SECONDS", 0.01)
    for step in range(1, 8):
        history.append(RunDir(tmp_path), {**LINE, metrics.STEP: step})
    return RunDir(tmp_path)


def report(queue, steps):
    for step in steps:
        queue.report({**LINE, metrics.STEP: step}, None)


@pytest.mark.parametrize("sent_count", range(8))
def test_each_step_is_sent_once_however_many_the_server_has(run, sent_count):
    """An earlier worker group did seven steps and sent some; this one repeats those after its checkpoint at step 5."""
    server = Server(range(1, sent_count + 1), failures=3)
    unsent_count = 1
    while unsent_count:
        queue = QueuedTracker(server, run, 5)
        report(queue, range(6, 60))
        unsent_count = queue.finish("FINISHED")
    assert server.steps == list(range(1, 60))


def test_training_waits_for_no_server(run, monkeypatch, caplog):
    """All calls return while the server's first call has not returned, and what is unsent is counted."""
    monkeypatch.setattr(tracker, "CLOSE_SECONDS", 0.1)
    server = Server(answers=Event())
    queue = QueuedTracker(server, run, 0)
    report(queue, range(1, 101))
    queue.flush()
    with caplog.at_level(logging.WARNING, "mhmoe"):
        queue.close("KILLED")
    assert not server.steps
    assert "steps that a server did not accept: 100;" in caplog.text
    server.answers.set()
    assert server.end_event.wait(10)
    assert server.steps == list(range(1, 101))
