"""Tests of the line of metrics of a step."""

import torch

from mhmoe_ray.runs import metrics
from mhmoe_ray.train.step import StepSums, Update
from mhmoe_ray.train.telemetry.line import RankTimes, step_line
from tests.support.specs import tiny_spec
from tests.train.jobs import build_trainer


def test_a_layer_without_routes_has_load_and_entropy_0():
    spec = tiny_spec()
    count_LE = torch.tensor([[4, 4], [0, 0]])
    totals = StepSums(1, 1.0, 1.0, 0, count_LE, torch.zeros(0, 2))
    line = step_line(build_trainer(spec), 1, totals, "", RankTimes(0.0, 0.0), Update(1.0, 0.1, True), 1.0)
    assert line[metrics.LEAST_EXPERT] == line[metrics.ENTROPY] == 0.0


def test_the_line_has_the_loss_of_each_part():
    """A part of the micro-batches without targets has the loss 0, because there is no mean."""
    parts = {name: {"sources": [name], "micro_batch_size": 1} for name in ("web", "books")}
    spec = tiny_spec(data={"sources": {"web": {"path": "web"}, "books": {"path": "books"}}, "parts": parts})
    part_sums_P2 = torch.tensor([[6.0, 4.0], [0.0, 0.0]])
    totals = StepSums(4, 6.0, 1.0, 0, torch.ones(2, 4), part_sums_P2)
    line = step_line(build_trainer(spec), 1, totals, "", RankTimes(0.0, 0.0), Update(1.0, 0.1, True), 1.0)
    assert line[metrics.PART_LOSS] == {"web": 1.5, "books": 0.0}
    assert metrics.tagged_values(line)["loss/training_web"] == 1.5
