"""Dashboards as the JSON that Grafana imports or is provisioned with."""

from typing import Any

from mhmoe_ray.render.dashboards import Dashboard, Panel

SCHEMA = 39
"""Of Grafana 10 and later."""
WIDTH, HEIGHT = 12, 8
"""Of a panel; a row is 24 wide."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(of: Dashboard) -> dict[str, Any]:
    return {
        "uid": f"mhmoe-{of.name}",
        "title": of.title,
        "tags": ["mhmoe"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _variable(of)]},
        "panels": [_panel(panel, number) for number, panel in enumerate(of.panels)],
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(of: Dashboard) -> dict[str, Any]:
    return {
        "name": of.label,
        "type": "query",
        "datasource": SOURCE,
        "query": f"label_values({of.chosen_from}, {of.label})",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    bars = panel.kind == "bargauge"
    return {
        "id": number + 1,
        "title": panel.title,
        "description": panel.about,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": {"x": number % 2 * WIDTH, "y": number // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, **({"min": 0} if bars else {})}, "overrides": []},
        "options": {"orientation": "horizontal", "displayMode": "gradient"} if bars else {},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": query, "legendFormat": legend, "instant": bars}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def provisioning() -> dict[str, Any]:
    """What Grafana reads when it starts, by path below its folder `provisioning`."""
    source = {"name": "Prometheus", "type": "prometheus", "url": "http://localhost:9090", "isDefault": True}
    folder = {"name": "mhmoe", "type": "file", "options": {"path": "/var/lib/grafana/dashboards"}}
    return {
        "datasources/prometheus.yml": {"apiVersion": 1, "datasources": [source]},
        "dashboards/mhmoe.yml": {"apiVersion": 1, "providers": [folder]},
    }
