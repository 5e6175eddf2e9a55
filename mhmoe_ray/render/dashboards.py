"""What Grafana shows: training, routing and serving, each a list of panels with their queries in PromQL."""

from typing import Literal, NamedTuple

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.metrics import EXPERT_LOAD, LAYER_ENTROPY, PREFIX, RANK, RUN, SKIPPED_STEPS_TOTAL, STEPS

Unit = Literal["short", "percentunit", "s", "reqps", "bytes", "none"]
"""Grafana's names: percentunit is of 1, reqps a second."""
WINDOW = "$__rate_interval"


class Panel(NamedTuple):
    title: str
    queries: dict[str, str]
    """By legend, in which {{name}} stands for a label."""
    unit: Unit = "short"
    kind: Literal["timeseries", "bargauge", "stat"] = "timeseries"
    about: str = ""
    gpu: bool = False
    """It has data where there are GPUs alone."""


class Dashboard(NamedTuple):
    name: str
    title: str
    label: str
    """The variable that chooses among runs or models, and the label that it stands for."""
    chosen_from: str
    """A metric that has it."""
    panels: list[Panel]


def _train(name: str, *more: str) -> str:
    labels = ",".join(['run=~"$run"', *more])
    return f"ray_{PREFIX}{name}{{{labels}}}"


def _serve(name: str) -> str:
    return f'ray_mhmoe_{name}{{model=~"$model"}}'


def _rate(name: str, by: str = "model") -> str:
    return f"sum by ({by}) (rate({_serve(name)}[{WINDOW}]))"


def _quantiles(name: str) -> dict[str, str]:
    buckets = _rate(f"{name}_seconds_bucket_total", "model, le")  # counters of Ray's, which end so
    return {f"{{{{model}}}} {share:.0%}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.95)}


TRAINING = Dashboard(
    "training",
    "mhmoe: training",
    "run",
    f"ray_{PREFIX}{metrics.STEP}",
    [
        Panel("Progress", {"{{run}}": f"{_train(metrics.STEP)} / {_train(STEPS[0])}"}, "percentunit", "stat"),
        Panel("Loss", {"{{run}} training": _train(metrics.LOSS), "{{run}} validation": _train(metrics.VAL_LOSS)}),
        Panel("Tokens a second", {"{{run}}": _train(metrics.TOKENS_PER_S)}),
        Panel("Tokens", {"{{run}}": _train(metrics.TOKENS)}),
        Panel(
            "Model FLOPs utilisation", {"{{run}}": _train(metrics.MFU)}, "percentunit", about=RUN[metrics.MFU],
            gpu=True,
        ),
        Panel("Gradient norm", {"{{run}}": _train(metrics.GRAD_NORM)}),
        Panel("Learning rate", {"{{run}}": _train(metrics.LR)}),
        Panel("Steps without an update", {"{{run}}": _train((skipped := SKIPPED_STEPS_TOTAL)[0])}, about=skipped[1]),
        Panel(
            "Waiting for data",
            {"{{run}}, slowest rank": f"max by (run) ({_train(metrics.DATA_WAIT)})"},
            "percentunit",
            about=RANK[metrics.DATA_WAIT],
        ),
        Panel(
            "Waiting for rows of other ranks",
            {"{{run}} {{rank}}": _train(metrics.EXCHANGE_WAIT)},
            "percentunit",
            about=RANK[metrics.EXCHANGE_WAIT],
        ),
    ],
)  # fmt: skip

ROUTING = Dashboard(
    "routing",
    "mhmoe: routing",
    "run",
    f"ray_{PREFIX}{metrics.BALANCE}",
    [
        Panel("Balance loss", {"{{run}}": _train(metrics.BALANCE)}, about=RUN[metrics.BALANCE]),
        Panel("Least used expert", {"{{run}}": _train(metrics.LEAST_EXPERT)}, about=RUN[metrics.LEAST_EXPERT]),
        Panel("Dropped routes", {"{{run}}": _train(metrics.DROPPED)}, "percentunit"),
        Panel(
            "Entropy of loads, lowest of all layers",
            {"{{run}}": _train(metrics.ENTROPY)},
            about=RUN[metrics.ENTROPY],
        ),
        Panel(
            "Entropy of each layer's loads", {"{{run}} layer {{layer}}": _train(LAYER_ENTROPY[0])},
            about=LAYER_ENTROPY[1],
        ),
        Panel(
            "Load of each expert now", {"layer {{layer}}, {{expert}}": _train(EXPERT_LOAD[0])},
            kind="bargauge", about=EXPERT_LOAD[1],
        ),
        Panel(
            "Rows between ranks, a step",
            {"{{run}}": _train(metrics.ROWS_SENT), "{{run}} between nodes": _train(metrics.ROWS_BETWEEN_NODES)},
            "bytes",
        ),
    ],
)  # fmt: skip

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
