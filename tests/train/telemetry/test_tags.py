"""What trackers that sort by folders are told."""

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.metrics import TAGS


def test_they_hear_of_all_that_prometheus_hears_of_but_of_what_they_count_by():
    assert {*metrics.RUN, *metrics.RANK} - TAGS.keys() == {metrics.STEP, metrics.TOKENS}
    assert len(set(TAGS.values())) == len(TAGS)
