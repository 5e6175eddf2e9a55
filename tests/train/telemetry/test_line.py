"""The line of metrics that a step records."""

import torch

from mhmoe_ray.distributed.dispatch.exchange import Sent
from mhmoe_ray.runs import metrics
from mhmoe_ray.train.step import Update
from mhmoe_ray.train.telemetry import Totals, Waits, step_line
from tests.specs import tiny_spec
from tests.train.jobs import trainer_of


def test_a_layer_without_routes_has_loads_of_0():
    spec = tiny_spec()
    count_LE = torch.tensor([[4, 4], [0, 0]])
    totals = Totals(1, 1.0, 1.0, 0.0, count_LE, Sent(), 0, "")
    line = step_line(spec, trainer_of(spec), 1, totals, Waits(0.0, 0.0), Update(1.0, 0.1, True), 1.0)
    assert line[metrics.LEAST_EXPERT] == line[metrics.ENTROPY] == 0.0
