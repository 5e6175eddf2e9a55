"""Parameters and multiply-adds of the adapter of a run (`train.adapter`)."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from mhmoe_ray.planner.family import ATTENTION, EXPERTS, FEED_FORWARD, PROJECTIONS, ROUTER, SHARED
from mhmoe_ray.spec import RunSpec


class AdaptedPart(NamedTuple):
    """Adapters of one target in the layers of one kind."""

    name: str
    """Name of the part of the model that has the target (`ModelPart.name`)."""
    layers: int
    copies: int
    """Number of copies of the matrices in a layer: that of its experts, or 1."""
    rows: int
    """Number of rows per token that the matrices of a layer multiply."""
    parameters: int
    """Number of parameters of one copy."""
    hidden_values: int
    """Number of products with A, per row, that the backward needs."""
    dropout_values: int
    """Number of values per token to which dropout applies; the input of queries, keys and values counts each time."""


def adapted_parts(spec: RunSpec) -> Iterator[AdaptedPart]:
    """Yield the parts of a run's adapter; none without one."""
    adapter, model, moe = spec.train.adapter, spec.model, spec.model.moe
    if adapter is None:
        return
    d, keys, queries, products = model.d_model, model.kv_width, model.query_width, model.architecture.expert_matrices

    def part(name: str, layers: int, shapes: list[tuple[int, int]], copies: int = 1, rows: int = 1) -> AdaptedPart:
        rank = adapter.rank
        dropout_values = sum(width for width, _ in shapes) if name in (ATTENTION, PROJECTIONS) else 0
        return AdaptedPart(name, layers, copies, rows, rank * sum(map(sum, shapes)), rank * len(shapes), dropout_values)

    parts = {
        "query": part(ATTENTION, model.layers, [(d, queries)]),
        "key": part(ATTENTION, model.layers, [(d, keys)]),
        "value": part(ATTENTION, model.layers, [(d, keys)]),
        "out": part(ATTENTION, model.layers, [(queries, d)]),
        "feed_forward": part(FEED_FORWARD, model.dense_layers, [(d, model.d_ff or 0)] * products),
    }
    if moe is not None:
        sides = moe.has_head_projection + moe.has_merge_projection
        width, layers, experts = model.row_width, model.moe_layers, moe.experts
        parts |= {
            "projections": part(PROJECTIONS, layers, [*pairwise(model.projection_widths)] * sides),
            "shared": part(SHARED, layers, [(d, moe.d_shared)] * products),
            "router": part(ROUTER, layers, [(width, experts)], rows=moe.heads),
            "experts": part(EXPERTS, layers, [(width, moe.d_expert)] * products, experts, moe.heads * moe.top_k),
        }
    yield from (parts[target] for target in adapter.matched_targets(model))


def adapter_macs(spec: RunSpec, name: str | None = None) -> int:
    """Return the multiply-adds per token of the adapters of a part, or of all, in all layers."""
    return sum(p.layers * p.rows * p.parameters for p in adapted_parts(spec) if name in (None, p.name))


def kept_bytes(spec: RunSpec, name: str, size: int) -> int:
    """Return the bytes per token that the adapters of a part keep for the backward in one layer."""
    adapter, parts = spec.train.adapter, [p for p in adapted_parts(spec) if p.name == name]
    total = size * sum(p.rows * p.hidden_values for p in parts)
    if adapter and adapter.dropout:
        # Dropout keeps its result, and a mask of one byte per value.
        total += (size + 1) * sum(p.dropout_values for p in parts)
    return total
