"""Monitoring of clusters: how Prometheus finds Ray's nodes, and the content and JSON of Grafana's dashboards."""

from typing import Any, NamedTuple

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.metrics import METRICS, PREFIX, PanelKind, Unit
from mhmoe_ray.spec.site import SiteSpec

DISCOVERY_FILE = "prom_metrics_service_discovery.json"
"""Name of the file in which Ray's head node keeps the addresses of all nodes, in its folder for temporary files."""
RAY_FOLDER = "/tmp/ray"
"""Default path of Ray's folder for temporary files."""


def prometheus_config(ray_folder: str) -> dict[str, Any]:
    """Return the configuration of a Prometheus server on the head node, whose --temp-dir is `ray_folder`."""
    return {
        "global": {"scrape_interval": "10s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [f"{ray_folder}/{DISCOVERY_FILE}"]}]}],
    }


def pod_monitor(site: SiteSpec) -> dict[str, Any]:
    """Return a PodMonitor, by which Kubernetes' Prometheus operator finds all Ray pods of the site's namespace."""
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


# Time window of a rate. Grafana replaces this variable by the time of at least four scrapes, so that the window holds
# the two scrapes that a rate needs.
RATE_WINDOW = "$__rate_interval"


class DashboardPanel(NamedTuple):
    """A panel of a Grafana dashboard."""

    title: str
    queries: dict[str, str]
    """Queries in PromQL by legend; {{name}} in a legend stands for the value of a label."""
    unit: Unit = "short"
    kind: PanelKind = "timeseries"
    help: str = ""
    needs_gpu: bool = False


class Dashboard(NamedTuple):
    """A Grafana dashboard of training runs or served models; a variable chooses which runs or models it shows."""

    name: str
    title: str
    label: str
    """Name of the variable and of the metrics' label that it filters: `run` or `model`."""
    source_metric: str
    """Name of a metric with this label, whose values are the choices of the variable."""
    panels: list[DashboardPanel]


def _run_series(name: str) -> str:
    """Return the PromQL selector of a training metric of the chosen runs."""
    # The selector uses =~, because Grafana writes a choice of several runs as a regular expression.
    return f'ray_{PREFIX}{name}{{run=~"$run"}}'


def _run_panels(dashboard: str) -> list[DashboardPanel]:
    """Return the panels that the metrics declare for a dashboard; metrics with equal panel titles share one panel."""
    series = {name: _run_series(name) for name in METRICS}
    panels: dict[str, DashboardPanel] = {}
    for metric in METRICS.values():
        panel_spec = metric.panel
        if panel_spec is None or panel_spec.dashboard != dashboard:
            continue
        query = {panel_spec.legend: panel_spec.query.format(series[metric.name], **series)}
        if (shared_panel := panels.get(panel_spec.title)) is not None:
            merged_panel = shared_panel._replace(
                queries=shared_panel.queries | query, help=f"{shared_panel.help} {metric.help}"
            )
            panels[panel_spec.title] = merged_panel
        else:
            unit = panel_spec.unit or metric.unit
            panels[panel_spec.title] = DashboardPanel(
                panel_spec.title, query, unit, panel_spec.kind, metric.help, metric.needs_gpu
            )
    return list(panels.values())


def _model_series(name: str) -> str:
    """Return the PromQL selector of a serving metric of the chosen models."""
    return f'ray_mhmoe_{name}{{model=~"$model"}}'


def _rate_query(name: str, label_names: str = "model") -> str:
    """Return the PromQL query of a serving counter's increase per second, summed for each combination of the labels."""
    return f"sum by ({label_names}) (rate({_model_series(name)}[{RATE_WINDOW}]))"


def _quantile_queries(name: str) -> dict[str, str]:
    """Return the PromQL queries of the median and the 95 % quantile of a histogram in seconds, by panel legend."""
    # A bucket of the histogram is a counter of its own (serving/ray_metrics.py), and Ray appends _total to the names of
    # counters.
    buckets = _rate_query(f"{name}_seconds_bucket_total", "model, le")
    return {f"{{{{model}}}} {share:.0%}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.95)}


TRAINING = Dashboard("training", "mhmoe: training", "run", f"ray_{PREFIX}{metrics.STEP}", _run_panels("training"))
ROUTING = Dashboard("routing", "mhmoe: routing", "run", f"ray_{PREFIX}{metrics.BALANCE}", _run_panels("routing"))
SERVING = Dashboard(
    "serving",
    "mhmoe: serving",
    "model",
    "ray_mhmoe_running",
    [
        DashboardPanel("Requests a second", {"{{model}}": _rate_query("requests_total")}, "reqps"),
        DashboardPanel("Tokens a second", {"{{model}} answers": _rate_query("answer_tokens_total"),
                                  "{{model}} prompts": _rate_query("prompt_tokens_total")}),
        DashboardPanel("Time to the first token", _quantile_queries("first_token"), "s"),
        DashboardPanel("Time of each further token", _quantile_queries("each_token"), "s"),
        DashboardPanel("Time in the queue", _quantile_queries("queue"), "s"),
        DashboardPanel("Requests now", {"{{model}} computed": f"sum by (model) ({_model_series('running')})",
                               "{{model}} waiting": f"sum by (model) ({_model_series('waiting')})"}),
        DashboardPanel("Cache in use", {"{{model}} {{replica}}": _model_series("cache_used")}, "percentunit"),
        DashboardPanel("Tokens in a step", {
            "{{model}}": f"{_rate_query('step_tokens_total')} / {_rate_query('steps_total')}"}),
        DashboardPanel("Prompt tokens that were in the cache", {
            "{{model}}": f"{_rate_query('reused_tokens_total')} / {_rate_query('prompt_tokens_total')}"},
            "percentunit"),
        DashboardPanel("Routes of each expert, a second", {
            "layer {{layer}}, {{expert}}": _rate_query("expert_routes_total", "model, layer, expert")},
            kind="bargauge"),
    ],
)  # fmt: skip

DASHBOARDS = (TRAINING, ROUTING, SERVING)


SCHEMA_VERSION = 39
"""Version of Grafana's dashboard format. A newer Grafana migrates a dashboard when it loads it."""
PANEL_WIDTH, PANEL_HEIGHT = 12, 8
"""Size of a panel in units of Grafana's grid, which is 24 units wide."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
"""Reference to the Prometheus that the variable `datasource` of a dashboard chooses."""


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """Return a dashboard in Grafana's JSON format."""
    return {
        "uid": f"mhmoe-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["mhmoe"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _label_variable(dashboard)]},
        "panels": [_panel_json(panel, number) for number, panel in enumerate(dashboard.panels)],
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _label_variable(dashboard: Dashboard) -> dict[str, Any]:
    """Return the dashboard's variable that chooses one, several or all runs or models."""
    return {
        "name": dashboard.label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": f"label_values({dashboard.source_metric}, {dashboard.label})",
        # 2 makes Grafana read the values again whenever the time range changes.
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panel_json(panel: DashboardPanel, number: int) -> dict[str, Any]:
    """Return a panel in Grafana's JSON format; `number`, from 0, gives its position in a grid of two panels per row."""
    # A bar gauge compares only the newest values, with bars that start at 0. Other panels show values over time.
    is_bar_gauge = panel.kind == "bargauge"
    return {
        "id": number + 1,
        "title": panel.title,
        "description": panel.help,
        "type": panel.kind,
        "datasource": DATASOURCE,
        "gridPos": {
            "x": number % 2 * PANEL_WIDTH,
            "y": number // 2 * PANEL_HEIGHT,
            "w": PANEL_WIDTH,
            "h": PANEL_HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, **({"min": 0} if is_bar_gauge else {})}, "overrides": []},
        "options": {"orientation": "horizontal", "displayMode": "gradient"} if is_bar_gauge else {},
        "targets": [
            {
                # Grafana names the queries of a panel A, B, C and so on.
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend,
                "instant": is_bar_gauge,
            }
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def provisioning_files() -> dict[str, Any]:
    """Return the contents of the files that Grafana reads when it starts, by path below its folder `provisioning`."""
    source = {"name": "Prometheus", "type": "prometheus", "url": "http://localhost:9090", "isDefault": True}
    folder = {"name": "mhmoe", "type": "file", "options": {"path": "/var/lib/grafana/dashboards"}}
    return {
        "datasources/prometheus.yml": {"apiVersion": 1, "datasources": [source]},
        "dashboards/mhmoe.yml": {"apiVersion": 1, "providers": [folder]},
    }
