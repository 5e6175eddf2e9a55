"""Tests of the sinks of a run's metrics."""

import torch

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train.telemetry import sinks
from mhmoe_ray.train.telemetry.line import RankTimes
from mhmoe_ray.train.telemetry.sinks import Telemetry
from tests.support.events import LINE
from tests.support.specs import tiny_spec


class ListTracker:
    """A tracker that lists its calls."""

    def __init__(self):
        self.calls = []

    def report(self, line, loads_LE):
        self.calls.append((line[metrics.STEP], loads_LE.tolist()))

    def report_checkpoint(self, checkpoint):
        self.calls.append(checkpoint)

    def flush(self):
        self.calls.append("flush")

    def close(self, end_status):
        self.calls.append(end_status)


def open_telemetry(folder, rank):
    return Telemetry(RunDir(folder), tiny_spec(folder), rank, group=1, start=0)


def test_trackers_get_the_lines_and_the_end_of_a_run_from_rank_0(tmp_path, monkeypatch):
    tracker = ListTracker()
    monkeypatch.setattr(sinks, "TensorBoard", lambda *_: tracker)
    for rank in (1, 0):
        telemetry = open_telemetry(tmp_path, rank)
        for step in (1, 2):
            line = {**LINE, metrics.STEP: step}
            telemetry.report(line, torch.ones(1, 4), RankTimes(0.0, 0.0))
        telemetry.report_checkpoint(tmp_path / "checkpoint")
        telemetry.flush()
        telemetry.close("KILLED")
    assert tracker.calls == [(1, [[1.0] * 4]), (2, [[1.0] * 4]), tmp_path / "checkpoint", "flush", "KILLED"]
    assert [line[metrics.STEP] for line in history.read(RunDir(tmp_path))] == [1, 2]
