"""One entry of the registry reaches everything that shows a metric."""

import json
import math

import pytest

from mhmoe_ray.cli import status
from mhmoe_ray.render import monitoring
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.runs.metrics import METRICS, Metric, Panel, tagged
from tests.specs import tiny_spec


def test_names_tags_and_panels_are_there_once():
    assert all(name == metric.name for name, metric in METRICS.items())
    tags = [metric.tag for metric in METRICS.values() if metric.tag]
    assert len(set(tags)) == len(tags)
    assert all(metric.help.endswith(".") for metric in METRICS.values())


def test_all_that_prometheus_has_of_a_run_has_a_panel_or_a_part_in_one():
    queries = "\n".join(q for of in monitoring.DASHBOARDS for panel in of.panels for q in panel.queries.values())
    for metric in METRICS.values():
        assert (f"{metrics.PREFIX}{metric.name}{{" in queries) == (metric.scope != "file"), metric.name


def test_an_entry_alone_adds_a_tag_a_panel_with_its_unit_and_a_row(monkeypatch):
    toy = Metric("toy", "Bytes of toys.", "bytes", tag="toys/bytes", panel=Panel("routing", "Toys"), status="{:,} B")
    monkeypatch.setitem(METRICS, "toy", toy)
    assert tagged({"toy": 5, "loss": math.nan}) == {"toys/bytes": 5}
    panel = monitoring._run_panels("routing")[-1]
    assert (panel.title, panel.unit, panel.help) == ("Toys", "bytes", "Bytes of toys.")
    assert json.dumps(monitoring.dashboard(monitoring.ROUTING._replace(panels=[panel])))
    found = {"last": {"loss": 1.0, "toy": 5000, "step": 1}, "validation": None, "baselines": None, "curve": []}
    assert status._quality(found)["toy"] == "5,000 B"


def test_a_line_with_a_name_that_is_not_registered_is_our_mistake(tmp_path):
    run = create_run(tiny_spec(storage=tmp_path))
    with pytest.raises(AssertionError, match=r"not in the registry: \{'toy'\}"):
        history.append(run, {"step": 1, "toy": 1})
