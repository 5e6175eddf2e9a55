"""The first paper's own figures of speed, to set beside ours: whole models, trained on 8 RTX 3090 cards.

From the authors' answers in the review of P1 (arXiv 2404.15045). Its h and sizes are not stated.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mhmoe_ray.bench.measure import Figures

TOKENS_A_SECOND = {
    ("SMoE", "static"): 32.21,
    ("SMoE", "dynamic"): 33.98,
    ("MH-MoE", "static"): 25.77,
    ("MH-MoE", "dynamic"): 31.93,
}


def time_ratio(model: str, routing: str) -> float:
    """Of its time for a token to that of the dynamic SMoE."""
    return TOKENS_A_SECOND["SMoE", "dynamic"] / TOKENS_A_SECOND[model, routing]


class Beside(NamedTuple):
    layer: str
    """Ours."""
    paper: str
    """The paper's model."""
    tokens_a_second: float
    papers_ratio: float
    """Of time for a token to that of the paper's dynamic SMoE."""
    our_ratio: float
    """Of time to that of our plain layer."""


def beside(figures: Sequence[Figures]) -> list[Beside]:
    """Our plain and multi-head layers, static and dropless, beside the paper's models."""
    [plain] = (f.median for f in figures[1:2])
    rows = []
    for f in figures:
        kind = next((kind for kind in ("SMoE", "MH-MoE") if f.name.startswith(kind)), None)
        if kind is None or f.moe is None:
            continue
        routing = "dynamic" if f.moe.capacity_factor is None else "static"
        found = TOKENS_A_SECOND[kind, routing]
        rows.append(Beside(f.name, f"{kind} {routing}", found, time_ratio(kind, routing), f.median / plain))
    return rows
