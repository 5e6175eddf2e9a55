"""Hierarchical dispatch: a row (sub-token) crosses the slow links between nodes once for each node with its experts.

An expert-parallel group has G nodes of P ranks each, in the order of nodes, so that a node holds a range of experts. A
rank's rail is the set of ranks at its position on every node. Along the rail, a row is sent once to each other node
that has an expert for it, with its gates and expert numbers. The receiving rank dispatches it flat within its node,
with its own rows. One sum of weighted outputs is sent back for each row, and the sender adds it to its own.

    forward     counts | rows, gates along the rail | own and received rows, flat | sums back, added
    backward             gradients of sums out      | the same                    | gradients of rows and gates back

A shared expert is computed while rows, and in the backward their gradients, travel along the rail.

A row with two experts on another node crosses once each way instead of twice, but may be sent on to a neighbour there.
A sum in bfloat16 is rounded once more than in flat dispatch, and the host waits for the device twice. Traffic between
nodes does not shrink if each route is a row of its own, as under dropout (`model/moe.py`).

The two stages are those of DeepSpeed-MoE (arXiv 2201.05596). In DeepSeek-V3 (arXiv 2412.19437, section 3.2.2) a row
also crosses once per node, but the number of nodes is limited.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels import Function, add_routes, permute, plan_for_kernel
from mhmoe_ray.distributed.dispatch.exchange import RowExchange, SentBytes
from mhmoe_ray.distributed.dispatch.flat import ExchangePlan, FlatDispatch
from mhmoe_ray.distributed.dispatch.inner_pass import SharedPass, restore_saved, shared_arguments, take_all_saved
from mhmoe_ray.model.feedforward import Experts, SharedExpert
from mhmoe_ray.model.recompute import recall
from mhmoe_ray.model.router import Routing


class ExchangedRows(NamedTuple):
    """Numbers of rows at the source or the target of an exchange."""

    count_J: list[int]  # rows sent to, or received from, each other rank
    rows: int
    """Number of all rows; those after the exchanged ones are not sent at the source, and are 0 at the target."""


def exchange_rows(
    exchange: RowExchange,
    source_counts: ExchangedRows,
    target_counts: ExchangedRows,
    tensors: Sequence[Tensor],
    shared: SharedExpert | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Exchange rows of two-dimensional tensors, of any dtype and width, with equally many rows. Return the received
    rows of each, and the output of the shared expert, computed meanwhile. The backward exchanges gradients in the
    opposite direction."""
    shared_function, shared_tensors = shared_arguments(shared)
    # `torch.is_grad_enabled()` is called here, because gradients are always disabled inside an autograd function.
    outputs = _apply_exchange(
        exchange, source_counts, target_counts, shared_function, torch.is_grad_enabled(), len(tensors), *tensors,
        *shared_tensors,
    )  # fmt: skip
    return list(outputs[: len(tensors)]), None if shared is None else outputs[-1]


def _exchange_tensors(
    exchange: RowExchange,
    source_counts: ExchangedRows,
    target_counts: ExchangedRows,
    tensors: list[Tensor],
    compute_meanwhile: Callable[[], None],
) -> list[Tensor]:
    """Exchange rows like `exchange_rows`, without autograd; `compute_meanwhile` runs while rows travel."""
    sent_rows, received_rows = sum(source_counts.count_J), sum(target_counts.count_J)
    # The rows of all tensors are joined byte by byte into one tensor, so that there is one exchange instead of several.
    rows = torch.cat([t[:sent_rows].contiguous().view(torch.uint8) for t in tensors], 1)
    received = rows.new_empty(received_rows, rows.shape[1])
    pending = exchange.start_rows(rows, received, source_counts.count_J, target_counts.count_J)
    compute_meanwhile()
    pending.wait()
    outputs = [t.new_empty(target_counts.rows, t.shape[1]) for t in tensors]
    for t, part in zip(outputs, torch.split(received, [t.shape[1] * t.itemsize for t in tensors], 1), strict=True):
        t[:received_rows].view(torch.uint8).copy_(part)
        t[received_rows:] = 0
    return outputs


class _ExchangeRows(torch.autograd.Function):
    """Autograd function of `exchange_rows`."""

    @staticmethod
    def forward(
        ctx: Any,
        exchange: RowExchange,
        source_counts: ExchangedRows,
        target_counts: ExchangedRows,
        shared_function: Function | None,
        differentiable: bool,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        shared = SharedPass(shared_function, tensors[count:], differentiable)
        shared_outputs: list[Tensor] = []
        outputs = _exchange_tensors(
            exchange,
            source_counts,
            target_counts,
            list(tensors[:count]),
            lambda: shared_outputs.extend(shared.forward()),
        )
        ctx.reverse_arguments, ctx.shared, ctx.count = (exchange, target_counts, source_counts), shared, count
        ctx.save_for_backward(*take_all_saved(shared.passes))
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return *outputs, *shared_outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *all_gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradients, shared = all_gradients[: ctx.count], ctx.shared
        # ctx lives as long as the loss. The saved tensors are needed only in this call, so ctx must not keep them.
        del ctx.shared
        restore_saved(shared.passes, list(ctx.saved_tensors))
        # All gradients are sent, even those that this rank does not need: another rank may need them, and an exchange
        # must have the same tensors on all ranks.
        float_gradients = [gradient for gradient in gradients if gradient.is_floating_point()]
        exchange, source_counts, target_counts = ctx.reverse_arguments
        compute_shared = partial(shared.backward, all_gradients[ctx.count :])
        returned_gradients = iter(
            _exchange_tensors(exchange, source_counts, target_counts, float_gradients, compute_shared)
        )
        row_gradients = (next(returned_gradients) if g.is_floating_point() else None for g in gradients)
        return None, None, None, None, None, None, *row_gradients, *shared.gradients


_apply_exchange: Callable[..., tuple[Tensor, ...]] = _ExchangeRows.apply


class HierarchicalDispatch:
    """Hierarchical dispatch, a `model.feedforward.Dispatch`. Of G nodes with P ranks each, the p-th rank on node g
    holds the (g * P + p)-th share of the experts."""

    def __init__(self, node: dist.ProcessGroup, rail: dist.ProcessGroup) -> None:
        """Prepare dispatch in the node, ordered by experts, and along the rail, ordered by nodes."""
        self._flat = FlatDispatch(node)
        self._rail = RowExchange(rail, nodes=range(dist.get_world_size(rail)))

    def pop_sent_bytes(self) -> SentBytes:
        """Return the bytes that this rank sent since the last call."""
        return self._rail.pop_sent_bytes().plus(self._flat.pop_sent_bytes())

    def pop_wait_seconds(self) -> float:
        """Return the seconds that this rank waited for other ranks since the last call."""
        return self._rail.pop_wait_seconds() + self._flat.pop_wait_seconds()

    def __call__(
        self, x_ND: Tensor, routing: Routing, experts: Experts, shared: SharedExpert | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x_ND, weights = experts.cast_rows(x_ND)
        rail, expert_NK, gate_NK = self._rail, routing.expert_NK, routing.gate_NK
        experts_per_node = len(experts.expert_ids) * self._flat.ranks
        kernel = experts.select_kernel(x_ND, weights)
        routed = recall(partial(self._start, expert_NK, gate_NK, kernel, experts_per_node))
        # The host waits for the device here, to read these numbers, and once more in the flat dispatch.
        node_counts, in_J = routed.host_counts
        out_J = rail.exclude_own(node_counts)
        plan = routed.plan.trimmed(sum(rows for rows, _ in out_J))
        outgoing = (permute(x_ND, plan), permute(gate_NK, plan), plan.gather(expert_NK).int())
        local_counts = ExchangedRows([rows for rows, _ in out_J], len(outgoing[0]))
        remote_counts = ExchangedRows([rows for rows, _ in in_J], sum(rows for rows, _ in in_J))
        received, y_BTM = exchange_rows(rail, local_counts, remote_counts, outgoing, shared)
        x_WD, gate_WK, expert_WK = (
            torch.cat(tensors) for tensors in zip((x_ND, gate_NK, expert_NK), received, strict=True)
        )
        expert_WK = expert_WK - rail.rank * experts_per_node
        is_local_WK = (expert_WK >= 0) & (expert_WK < experts_per_node)
        expert_WK, gate_WK = (t.where(is_local_WK, 0) for t in (expert_WK, gate_WK))
        # The rank's own rows are dispatched together with the rows from its rail (the ranks at the same position on
        # other nodes), and so wait for the exchange along the rail. Dispatching the own rows meanwhile would take a
        # second flat dispatch, with five more exchanges, to hide at most 1/G of the experts' work on G nodes
        # (distributed/README.md).
        routes = node_counts[rail.rank][1] + sum(routes for _, routes in in_J)
        y_WD, _ = self._flat.dispatch_rows(x_WD, expert_WK, gate_WK, kernel, weights, routes=routes)
        y_ND, y_SD = torch.split(y_WD, [len(x_ND), remote_counts.rows])
        (sum_RD,), _ = exchange_rows(rail, remote_counts, local_counts, (y_SD,))
        return y_ND + add_routes(sum_RD, plan), y_BTM

    def _start(self, expert_NK: Tensor, gate_NK: Tensor, kernel: str, experts_per_node: int) -> ExchangePlan:
        """Sort rows by node and start the exchange of two counts for each node: the rows that are sent to it, and the
        routes to its experts."""
        # The plan treats the other nodes as experts: a row goes once to each other node that has an expert for one of
        # its kept routes.
        rail = self._rail
        node_G = torch.arange(rail.ranks, device=expert_NK.device)
        node_NK = (expert_NK // experts_per_node).masked_fill(gate_NK == 0, rail.ranks)
        routes_NG = (node_NK[..., None] == node_G).sum(1)
        is_sent_NG = (routes_NG > 0) & (node_G != rail.rank)
        plan = plan_for_kernel(kernel, node_G.where(is_sent_NG, rail.ranks), rail.ranks)
        count_G2 = torch.stack([plan.counts(rail.ranks), routes_NG.sum(0)], 1)
        other_counts = torch.cat([count_G2[: rail.rank], count_G2[rail.rank + 1 :]])
        return ExchangePlan(plan, rail, count_G2, other_counts)
