"""What trackers that sort by folders call a run's metrics."""

import math
from typing import Any

from mhmoe_ray.runs import metrics

TAGS = {
    metrics.LOSS: "loss/training",
    metrics.VAL_LOSS: "loss/validation",
    metrics.GRAD_NORM: "optimizer/gradient_norm",
    metrics.LR: "optimizer/learning_rate",
    metrics.TOKENS_PER_S: "speed/tokens_per_second",
    metrics.MFU: "speed/mfu",
    metrics.DATA_WAIT: "speed/data_wait",
    metrics.EXCHANGE_WAIT: "speed/exchange_wait",
    metrics.BALANCE: "routing/balance_loss",
    metrics.DROPPED: "routing/dropped",
    metrics.LEAST_EXPERT: "routing/least_expert",
    metrics.ENTROPY: "routing/entropy",
    metrics.ROWS_SENT: "exchange/rows_sent",
    metrics.ROWS_BETWEEN_NODES: "exchange/rows_between_nodes",
}


def tagged(line: dict[str, Any]) -> dict[str, float]:
    """Those of a step's line that are there and finite."""
    values = {tag: line.get(name) for name, tag in TAGS.items()}
    return {tag: value for tag, value in values.items() if value is not None and math.isfinite(value)}
