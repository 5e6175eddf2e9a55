"""Tests of the line of metrics of a step."""

import torch

from mhmoe_ray.distributed.dispatch.exchange import SentBytes
from mhmoe_ray.runs import metrics
from mhmoe_ray.train.step import Update
from mhmoe_ray.train.telemetry import StepTotals, WaitShares, step_line
from tests.specs import tiny_spec
from tests.train.jobs import build_trainer


def test_a_layer_without_routes_has_load_and_entropy_0():
    spec = tiny_spec()
    count_LE = torch.tensor([[4, 4], [0, 0]])
    totals = StepTotals(1, 1.0, 1.0, 0.0, count_LE, SentBytes(), 0, "")
    line = step_line(spec, build_trainer(spec), 1, totals, WaitShares(0.0, 0.0), Update(1.0, 0.1, True), 1.0)
    assert line[metrics.LEAST_EXPERT] == line[metrics.ENTROPY] == 0.0
