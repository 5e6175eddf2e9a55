"""Registry of a run's metrics, with one entry for each metric. All outputs below are made from these entries.

    metrics.jsonl        a line per step, written by runs/history.py; it takes registered names only
    Prometheus           gauges `ray_mhmoe_train_NAME` (train/telemetry/ray_metrics.py), with the label `run`
    trackers             values under `tag`
    Grafana              panels (render/monitoring.py); entries are in the order of the panels of a dashboard
    mhmoe status         a row, where `status` has a format
    mhmoe report         a plot, where `plot` has a title

This module does not need torch.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Required

import numpy as np
from pydantic import Field

from mhmoe_ray.parsing import Count, Figure, Time, object_parser

PREFIX = "mhmoe_train_"
"""Prefix of the names in Prometheus; Ray puts `ray_` before it."""
Unit = Literal["short", "percentunit", "s", "reqps", "bytes", "none"]
"""Units under Grafana's names: `percentunit` is a share from 0 to 1, `reqps` is a rate per second."""
PanelKind = Literal["timeseries", "bargauge", "stat"]


class Panel(NamedTuple):
    """Grafana panel of a metric; metrics with the same title share one, with the unit and kind of the first."""

    dashboard: Literal["training", "routing"]
    title: str
    legend: str = "{{run}}"
    """Legend of the series; a label stands in double braces."""
    query: str = "{0}"
    """PromQL: {0} stands for the series of this metric, {NAME} for that of another one."""
    kind: PanelKind = "timeseries"
    unit: Unit | None = None
    """Unit of the query's result; by default the metric's unit."""


class Plot(NamedTuple):
    """Plot of a metric in a report: its title, and the label of its vertical axis."""

    title: str
    axis: str


@dataclass(frozen=True)
class Metric:
    """Entry of the registry: a metric, and how each output shows it."""

    name: str
    help: str
    """One sentence for Prometheus and the Grafana panel."""
    unit: Unit = "short"
    scope: Literal["run", "rank", "layer", "expert", "part", "file"] = "run"
    """Scope of a value, which Prometheus has as labels. A part is an objective with its data in a micro-batch; its
    values are an object by name in metrics.jsonl. Scope `file` is in metrics.jsonl only."""
    tag: str | None = None
    panel: Panel | None = None
    status: str | None = None
    """Format in `mhmoe status`, which omits zeros."""
    plot: Plot | None = None
    absent: float | None = None
    """Value in Prometheus after a step without the metric; by default the gauge stays unchanged then."""
    needs_gpu: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels in Prometheus besides `run`."""
        return {"rank": ("rank",), "layer": ("layer",), "expert": ("layer", "expert"), "part": ("part",)}.get(
            self.scope, ()
        )


METRICS: dict[str, Metric] = {}
"""All metrics by name, in the order of their registration."""


def _metric(name: str, help: str, **fields: Any) -> str:
    METRICS[name] = Metric(name, help, **fields)
    return name


STEP = _metric(
    "step",
    "Steps done.",
    panel=Panel("training", "Progress", query="{0} / {steps}", kind="stat", unit="percentunit"),
)
STEPS = _metric("steps", "Number of steps of the complete run.")
LOSS = _metric(
    "loss",
    "Mean loss of the newest step, in nats per token, or of pairs in nats per pair; of encoders and vision models, the "
    "weighted sum over all parts.",
    tag="loss/training",
    panel=Panel("training", "Loss", "{{run}} training"),
    plot=Plot("training loss", "nats per token"),
)
PART_LOSS = _metric(
    "part_loss",
    "Mean loss of the newest step in each part of its micro-batches (`data.parts`), in the unit of its objective.",
    scope="part",
    panel=Panel("training", "Loss", "{{run}} training, {{part}}"),
)
VAL_LOSS = _metric(
    "val_loss",
    "Loss of the newest validation on held-out samples, in the unit of `loss`.",
    tag="loss/validation",
    panel=Panel("training", "Loss", "{{run}} validation"),
)
VAL_PART_LOSS = _metric(
    "val_part_loss",
    "Loss of the newest validation on the held-out samples of each part, in the unit of `part_loss`.",
    scope="part",
    panel=Panel("training", "Loss", "{{run}} validation, {{part}}"),
)
REWARDS = _metric(
    "rewards",
    "Direct preference optimization: mean rewards of the chosen and the rejected answers of the newest step, their "
    "margins, and the share of pairs with a positive margin.",
    scope="part",
    panel=Panel("training", "Rewards", "{{run}} training, {{part}}"),
)
VAL_REWARDS = _metric(
    "val_rewards",
    "The same of the newest validation on held-out pairs.",
    scope="part",
    panel=Panel("training", "Rewards", "{{run}} validation, {{part}}"),
)
TOKENS_PER_S = _metric(
    "tokens_per_s",
    "Tokens per second in the newest step.",
    tag="speed/tokens_per_second",
    panel=Panel("training", "Tokens a second"),
)
TOKENS = _metric("tokens", "Tokens predicted so far, without padding.", panel=Panel("training", "Tokens"))
MFU = _metric(
    "mfu",
    "Model FLOPs over the peak of the accelerators (`cluster.accelerator`); absent on CPUs.",
    unit="percentunit",
    tag="speed/mfu",
    panel=Panel("training", "Model FLOPs utilisation"),
    needs_gpu=True,
)
GRAD_NORM = _metric(
    "grad_norm",
    "Norm of the gradient before clipping.",
    tag="optimizer/gradient_norm",
    panel=Panel("training", "Gradient norm"),
)
LR = _metric("lr", "Learning rate.", tag="optimizer/learning_rate", panel=Panel("training", "Learning rate"))
SKIPPED_STEPS = _metric(
    "skipped_steps",
    "Steps that updated nothing because their gradient was not finite or they were spikes.",
    panel=Panel("training", "Steps without an update"),
    absent=0,
)
DATA_WAIT = _metric(
    "data_wait",
    "Share of the newest step's time that a rank waited for the stream; metrics.jsonl has the slowest rank's.",
    unit="percentunit",
    scope="rank",
    tag="speed/data_wait",
    panel=Panel("training", "Waiting for data", "{{run}}, slowest rank", "max by (run) ({0})"),
)
EXCHANGE_WAIT = _metric(
    "exchange_wait",
    "Share of the newest step's time that a rank waited for rows of other ranks; metrics.jsonl has the slowest rank's.",
    unit="percentunit",
    scope="rank",
    tag="speed/exchange_wait",
    panel=Panel("training", "Waiting for rows of other ranks", "{{run}} {{rank}}"),
)
SLOWDOWN = _metric(
    "slowdown",
    "Time of a rank without waits for other ranks in the newest step, over the median of the others; metrics.jsonl has "
    "the slowest rank's.",
    scope="rank",
    tag="speed/slowdown",
    panel=Panel("training", "Time of each rank over that of the others", "{{run}} {{rank}}"),
)
BALANCE = _metric(
    "balance",
    "Balance loss per layer; 1 is uniform.",
    tag="routing/balance_loss",
    panel=Panel("routing", "Balance loss"),
    plot=Plot("balance loss", "1 is uniform"),
)
LEAST_EXPERT = _metric(
    "least_expert",
    "Share of routes of the least used expert, times the number of experts; 1 is uniform.",
    tag="routing/least_expert",
    panel=Panel("routing", "Least used expert"),
)
DROPPED = _metric(
    "dropped",
    "Share of routes dropped because their expert was full.",
    unit="percentunit",
    tag="routing/dropped",
    panel=Panel("routing", "Dropped routes"),
    status="{:.2%} of routes",
    plot=Plot("dropped routes", "share"),
)
ENTROPY = _metric(
    "entropy",
    "Entropy of the loads of a layer's experts over the highest possible, lowest of all layers; 1 is uniform.",
    tag="routing/entropy",
    panel=Panel("routing", "Entropy of loads, lowest of all layers"),
    plot=Plot("entropy of loads, lowest layer", "1 is uniform"),
)
LAYER_ENTROPY = _metric(
    "layer_entropy",
    "Entropy of the loads of a layer's experts over the highest possible.",
    scope="layer",
    panel=Panel("routing", "Entropy of each layer's loads", "{{run}} layer {{layer}}"),
)
EXPERT_LOAD = _metric(
    "expert_load",
    "Share of its layer's routes that an expert got, times the number of experts; 1 is uniform.",
    scope="expert",
    panel=Panel("routing", "Load of each expert now", "layer {{layer}}, {{expert}}", kind="bargauge"),
)
TASK_TOP_K = _metric(
    "task_top_k",
    "Number of experts that each task of a vision model chooses, where it is adaptive.",
    scope="part",
    panel=Panel("routing", "Experts that a task chooses", "{{run}} {{part}}"),
)
ROWS_SENT = _metric(
    "rows_sent",
    "Bytes of routed rows, outputs and gradients that left their rank in the newest step, over all ranks.",
    unit="bytes",
    tag="exchange/rows_sent",
    panel=Panel("routing", "Rows between ranks, a step"),
)
ROWS_BETWEEN_NODES = _metric(
    "rows_between_nodes",
    "Bytes of these rows that left their node.",
    unit="bytes",
    tag="exchange/rows_between_nodes",
    panel=Panel("routing", "Rows between ranks, a step", "{{run}} between nodes"),
)
ROWS_LEAST = _metric(
    "rows_least", "Smallest number of bytes that flat dispatch could send for these routes.", scope="file"
)
COUNTS_SENT = _metric("counts_sent", "Bytes of row counts that left their rank, over all ranks.", scope="file")
GROUP = _metric("group", "Number of the worker group that wrote the line, from 1.", scope="file")
TIME = _metric("time", "End of the step, in seconds since the epoch.", scope="file")
STREAM = _metric("stream", "Digest of the step's samples, in order.", scope="file")
SKIPPED = _metric("skipped", "True where the step updated nothing.", scope="file")
VAL_TOKENS = _metric("val_tokens", "Held-out tokens of the validation.", scope="file")

parse_line = object_parser({
    **dict.fromkeys(METRICS, Figure | None),
    **dict.fromkeys((PART_LOSS, VAL_PART_LOSS, REWARDS, VAL_REWARDS), dict[str, Figure | None]),
    **dict.fromkeys((ROWS_SENT, ROWS_BETWEEN_NODES, ROWS_LEAST, COUNTS_SENT, SKIPPED_STEPS, VAL_TOKENS), Count),
    **{TASK_TOP_K: dict[str, Count], STREAM: str, SKIPPED: bool},
    **{STEP: Required[Annotated[int, Field(gt=0, lt=2**63)]], GROUP: Required[Count], TOKENS: Required[Count]},
    **{TIME: Required[Time], LOSS: Required[Figure | None], TOKENS_PER_S: Required[Figure]},
})  # fmt: skip
"""Parser of lines of metrics.jsonl, where null is a number that is not finite; all lines have the required metrics."""


def tagged_values(line: dict[str, Any]) -> dict[str, float]:
    """Return the finite values in a step's line of metrics by their tags in trackers."""
    values = {metric.tag: line.get(name) for name, metric in METRICS.items() if metric.tag}
    prefixes = {
        PART_LOSS: "loss/training",
        VAL_PART_LOSS: "loss/validation",
        REWARDS: "rewards/training",
        VAL_REWARDS: "rewards/validation",
    }
    for name, prefix in prefixes.items():
        values |= {f"{prefix}_{part}": value for part, value in line.get(name, {}).items()}
    return {tag: value for tag, value in values.items() if value is not None and math.isfinite(value)}


def describe_tags() -> str:
    """Return a table of the tags in Markdown, with unit and meaning."""
    rows = [f"| {m.tag} | {m.unit} | {m.help} |" for m in METRICS.values() if m.tag]
    return "\n".join(["| metric | unit | meaning |", "| --- | --- | --- |", *rows])


# Loss up to which a perplexity is computed: exp(709) is just below the largest float64, and exp(710) overflows.
_MAX_NATS = 709.0


def perplexity(loss: float | None) -> float | None:
    """Return the perplexity of a loss in nats per token; None without a finite loss, or if it exceeds any float."""
    return math.exp(loss) if loss is not None and loss < _MAX_NATS else None


def expert_loads(count_LE: np.ndarray) -> np.ndarray:
    """Return each expert's share of its layer's routes times E, (L, E) float64: 1 if uniform, 0 without routes."""
    return np.asarray(_route_shares(count_LE) * count_LE.shape[1])


def load_entropy(count_LE: np.ndarray) -> np.ndarray:
    """Return the entropy of each layer's shares of routes over the highest, log E, as (L,) float64.

    There must be at least two experts. 1 is a uniform distribution. 0 means that one expert got all routes, or that
    there are no routes at all.
    """
    share_LE = _route_shares(count_LE)
    # An expert without routes adds 0 to the entropy. Its logarithm would not be finite, so 0 takes its place.
    log_LE = np.log(share_LE, where=share_LE > 0, out=np.zeros_like(share_LE))
    return np.asarray(-(share_LE * log_LE).sum(1) / math.log(count_LE.shape[1]))


def _route_shares(count_LE: np.ndarray) -> np.ndarray:
    # Without `clip`, a layer without routes would have shares of NaN instead of 0.
    return np.asarray(count_LE / count_LE.sum(1, keepdims=True).clip(min=1))
