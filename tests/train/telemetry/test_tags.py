"""What trackers that sort by folders are told."""

from mhmoe_ray.runs import metrics, prometheus
from mhmoe_ray.train.telemetry.tags import TAGS


def test_they_hear_of_all_that_prometheus_hears_of_but_of_what_they_count_by():
    assert {*prometheus.RUN, *prometheus.RANK} - TAGS.keys() == {metrics.STEP, metrics.TOKENS}
    assert len(set(TAGS.values())) == len(TAGS)
