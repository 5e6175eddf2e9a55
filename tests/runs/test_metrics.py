"""Tests of the registry of metrics, whose entries define tags, dashboards and rows of `mhmoe status`."""

import json
import math

import pytest

from mhmoe_ray.cli import status
from mhmoe_ray.render import monitoring
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.runs.metrics import METRICS, Metric, Panel, tagged_values
from tests.support.specs import tiny_spec


def test_names_and_tags_are_unique():
    assert all(name == metric.name for name, metric in METRICS.items())
    tags = [metric.tag for metric in METRICS.values() if metric.tag]
    assert len(set(tags)) == len(tags)
    assert all(metric.help.endswith(".") for metric in METRICS.values())


def test_every_prometheus_metric_has_a_panel():
    queries = "\n".join(
        q for dashboard in monitoring.DASHBOARDS for panel in dashboard.panels for q in panel.queries.values()
    )
    for metric in METRICS.values():
        assert (f"{metrics.PREFIX}{metric.name}{{" in queries) == (metric.scope != "file"), metric.name


def test_registered_metric_gets_tag_panel_and_status_row(monkeypatch):
    toy_metric = Metric(
        "toy", "Bytes of toys.", "bytes", tag="toys/bytes", panel=Panel("routing", "Toys"), status="{:,} B"
    )
    monkeypatch.setitem(METRICS, "toy", toy_metric)
    assert tagged_values({"toy": 5, "loss": math.nan}) == {"toys/bytes": 5}
    panel = monitoring._run_panels("routing")[-1]
    assert (panel.title, panel.unit, panel.help) == ("Toys", "bytes", "Bytes of toys.")
    assert json.dumps(monitoring.dashboard_json(monitoring.ROUTING._replace(panels=[panel])))
    run_state = {"last": {"loss": 1.0, "toy": 5000, "step": 1}, "validation": None, "baselines": None, "curve": []}
    run_state["loss_unit"] = "nats per token"
    assert status._quality_rows(run_state)["toy"] == "5,000 B"


def test_unregistered_name_is_rejected(tmp_path):
    run = create_run(tiny_spec(tmp_path))
    with pytest.raises(AssertionError, match=r"not in the registry: \{'toy'\}"):
        history.append(run, {"step": 1, "toy": 1})
