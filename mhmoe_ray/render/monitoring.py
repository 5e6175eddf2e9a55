"""Monitoring: how Prometheus discovers the nodes, and the content and JSON of Grafana's dashboards."""

from typing import Any, NamedTuple

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.metrics import METRICS, PREFIX, PanelKind, Unit
from mhmoe_ray.spec.site import SiteSpec

DISCOVERY = "prom_metrics_service_discovery.json"
"""Name of the file in which Ray's head node keeps the addresses of all nodes, in its folder for temporary files."""
RAY_FOLDER = "/tmp/ray"
"""Default path of Ray's folder for temporary files."""


def prometheus(ray_folder: str) -> dict[str, Any]:
    """Return the configuration of a Prometheus server on the machine of the head node.

    Args:
        ray_folder: the folder that the head node was started with as --temp-dir.
    """
    return {
        "global": {"scrape_interval": "10s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [f"{ray_folder}/{DISCOVERY}"]}]}],
    }


def pod_monitor(site: SiteSpec) -> dict[str, Any]:
    """Return the PodMonitor for all pods of the cluster, which the Prometheus operator on Kubernetes reads."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {
            "name": f"{site.name}-ray",
            "namespace": site.namespace,
            "labels": dict(site.monitor_labels),
        },
        "spec": {
            "selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
            "podMetricsEndpoints": [{"port": "metrics", "interval": "10s"}],
        },
    }


WINDOW = "$__rate_interval"


class Panel(NamedTuple):
    title: str
    queries: dict[str, str]
    """Queries by legend, in which {{name}} stands for a label."""
    unit: Unit = "short"
    kind: PanelKind = "timeseries"
    help: str = ""
    needs_gpu: bool = False


class Dashboard(NamedTuple):
    name: str
    title: str
    label: str
    """Name of the variable that chooses among runs or models, and of the label that it stands for."""
    chosen_from: str
    """Name of a metric that has the label."""
    panels: list[Panel]


def _train(name: str) -> str:
    return f'ray_{PREFIX}{name}{{run=~"$run"}}'


def _run_panels(dashboard: str) -> list[Panel]:
    """Return the panels that the registry of metrics asks for; metrics with the same title share one."""
    series = {name: _train(name) for name in METRICS}
    panels: dict[str, Panel] = {}
    for metric in METRICS.values():
        asked = metric.panel
        if asked is None or asked.dashboard != dashboard:
            continue
        query = {asked.legend: asked.query.format(series[metric.name], **series)}
        if (first := panels.get(asked.title)) is not None:
            shared = first._replace(queries=first.queries | query, help=f"{first.help} {metric.help}")
            panels[asked.title] = shared
        else:
            unit = asked.unit or metric.unit
            panels[asked.title] = Panel(asked.title, query, unit, asked.kind, metric.help, metric.needs_gpu)
    return list(panels.values())


def _serve(name: str) -> str:
    return f'ray_mhmoe_{name}{{model=~"$model"}}'


def _rate(name: str, by: str = "model") -> str:
    return f"sum by ({by}) (rate({_serve(name)}[{WINDOW}]))"


def _quantiles(name: str) -> dict[str, str]:
    buckets = _rate(f"{name}_seconds_bucket_total", "model, le")  # counters of Ray's, which end so
    return {f"{{{{model}}}} {share:.0%}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.95)}


TRAINING = Dashboard("training", "mhmoe: training", "run", f"ray_{PREFIX}{metrics.STEP}", _run_panels("training"))
ROUTING = Dashboard("routing", "mhmoe: routing", "run", f"ray_{PREFIX}{metrics.BALANCE}", _run_panels("routing"))
SERVING = Dashboard(
    "serving",
    "mhmoe: serving",
    "model",
    "ray_mhmoe_running",
    [
        Panel("Requests a second", {"{{model}}": _rate("requests_total")}, "reqps"),
        Panel("Tokens a second", {"{{model}} answers": _rate("answer_tokens_total"),
                                  "{{model}} prompts": _rate("prompt_tokens_total")}),
        Panel("Time to the first token", _quantiles("first_token"), "s"),
        Panel("Time of each further token", _quantiles("each_token"), "s"),
        Panel("Time in the queue", _quantiles("queue"), "s"),
        Panel("Requests now", {"{{model}} computed": f"sum by (model) ({_serve('running')})",
                               "{{model}} waiting": f"sum by (model) ({_serve('waiting')})"}),
        Panel("Cache in use", {"{{model}} {{replica}}": _serve("cache_used")}, "percentunit"),
        Panel("Tokens in a step", {"{{model}}": f"{_rate('step_tokens_total')} / {_rate('steps_total')}"}),
        Panel("Prompt tokens that were in the cache", {
            "{{model}}": f"{_rate('reused_tokens_total')} / {_rate('prompt_tokens_total')}"}, "percentunit"),
        Panel("Routes of each expert, a second", {
            "layer {{layer}}, {{expert}}": _rate("expert_routes_total", "model, layer, expert")}, kind="bargauge"),
    ],
)  # fmt: skip

DASHBOARDS = (TRAINING, ROUTING, SERVING)


SCHEMA = 39
"""Version of the dashboard format of Grafana 10 and later."""
WIDTH, HEIGHT = 12, 8
"""Size of a panel; a row is 24 wide."""
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
        "description": panel.help,
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
    """Return the files that Grafana reads when it starts, by path below its folder `provisioning`."""
    source = {"name": "Prometheus", "type": "prometheus", "url": "http://localhost:9090", "isDefault": True}
    folder = {"name": "mhmoe", "type": "file", "options": {"path": "/var/lib/grafana/dashboards"}}
    return {
        "datasources/prometheus.yml": {"apiVersion": 1, "datasources": [source]},
        "dashboards/mhmoe.yml": {"apiVersion": 1, "providers": [folder]},
    }
