"""Hierarchical dispatch, first between nodes, then within them: a row crosses the slow links once for each node that
has experts for it.

The ranks of a group are G nodes of P ranks each, in order, so that a node holds a range of experts. A rank's rail is
the set of ranks at its position on every node. Along the rail a row goes to each other node that has an expert for it,
with its gates and the numbers of its experts. There the receiving rank dispatches it flat over its node, to that node's
experts only, together with its own rows for the experts of that node. One sum of weighted outputs comes back for each
row that was sent, and is added on the rank where the row came from.

    forward     counts | rows, gates along the rail | own rows and theirs, flat | sums back, added
    backward             gradients of sums out      | the same                  | gradients of rows and gates back

So a row with two experts on another node crosses once each way instead of twice, but may go on to a neighbour there;
and a sum in bfloat16 is rounded once more than in flat dispatch. The host waits for the device twice instead of once.
Where routes are rows of their own, as under dropout (`model/moe.py`), there is nothing to save.

A rank's own rows wait for the rail. Dispatching them while the others are in flight would take a second flat dispatch,
with five more exchanges and twice as many parts of the experts' work, to hide at most 1/G of that work
(kernels/README.md).

Two stages along and across nodes are the hierarchical all-to-all of DeepSpeed-MoE (arXiv 2201.05596); that a row
crosses once per node is as in DeepSeek-V3 (arXiv 2412.19437, section 3.2.2), here without a limit on the number of
nodes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels import combine, permute, plan_routes
from mhmoe_ray.distributed.dispatch.exchange import Exchange, Sent
from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.router import Routing


class End(NamedTuple):
    """Numbers of rows at one end of an exchange, where the rows start or where they arrive."""

    count_J: list[int]
    """Number of rows that go to, or come from, each other rank."""
    rows: int
    """Number of all rows of a tensor. Those behind the travelling rows do not travel, and are 0 wherever they are
    written."""


def travel(exchange: Exchange, leaving: End, arriving: End, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Exchange rows of several tensors and return what the other ranks sent, one tensor for each; differentiable.

    Args:
        exchange: exchange with the other ranks.
        leaving: numbers of rows of every tensor before the exchange.
        arriving: numbers of rows of every tensor after the exchange.
        tensors: two-dimensional tensors of any dtype and width. What all of them have of one row travels in one piece.
    """
    return _travel(exchange, leaving, arriving, *tensors)


def _exchanged(exchange: Exchange, leaving: End, arriving: End, tensors: list[Tensor]) -> list[Tensor]:
    going, coming = sum(leaving.count_J), sum(arriving.count_J)
    rows = torch.cat([t[:going].contiguous().view(torch.uint8) for t in tensors], 1)
    into = rows.new_empty(coming, rows.shape[1])
    exchange.rows(rows, into, leaving.count_J, arriving.count_J).wait()
    arrived = [t.new_empty(arriving.rows, t.shape[1]) for t in tensors]
    for t, part in zip(arrived, torch.split(into, [t.shape[1] * t.itemsize for t in tensors], 1), strict=True):
        t[:coming].view(torch.uint8).copy_(part)
        t[coming:] = 0
    return arrived


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, leaving: End, arriving: End, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.way_back = exchange, arriving, leaving
        arrived = _exchanged(exchange, leaving, arriving, list(tensors))
        ctx.mark_non_differentiable(*(t for t in arrived if not t.is_floating_point()))
        return tuple(arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Of all that could have one, also where it is not needed: another rank may need its own.
        travelling = [gradient for gradient in gradients if gradient.is_floating_point()]
        exchange, leaving, arriving = ctx.way_back
        arrived = iter(_exchanged(exchange, leaving, arriving, travelling))
        return None, None, None, *(next(arrived) if g.is_floating_point() else None for g in gradients)


_travel: Callable[..., tuple[Tensor, ...]] = _Travel.apply


class HierarchicalDispatch:
    """A `model.feedforward.Dispatch` over G x P ranks, of which the p-th on node g holds the (g * P + p)-th share of
    the experts."""

    def __init__(self, node: dist.ProcessGroup, rail: dist.ProcessGroup) -> None:
        """Prepare flat dispatch within the node and exchanges along the rail.

        Args:
            node: process group of the ranks of this rank's node, in the order of their shares of the experts.
            rail: process group of the ranks at this rank's position on each node, in the order of nodes.
        """
        self._flat = FlatDispatch(node)
        self._rail = Exchange(rail, nodes=range(dist.get_world_size(rail)))

    def pop_sent(self) -> Sent:
        """Return the bytes sent since the last call, and start from 0 again."""
        return self._rail.pop_sent().plus(self._flat.pop_sent())

    def pop_waited(self) -> float:
        """Return the seconds that this rank waited for data of other ranks since the last call, and start from 0
        again."""
        return self._rail.pop_waited() + self._flat.pop_waited()

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        x_ND, weights = experts.cast(x_ND)
        rail, expert_NK, gate_NK = self._rail, routing.expert_NK, routing.gate_NK
        each = len(experts.held) * self._flat.ranks  # experts of a node

        # A row goes to the nodes of its kept routes as it goes to experts elsewhere, with weight 1.
        node_G = torch.arange(rail.ranks, device=x_ND.device)
        node_NK = (expert_NK // each).masked_fill(gate_NK == 0, rail.ranks)
        routes_NG = (node_NK[..., None] == node_G).sum(1)
        goes_NG = (routes_NG > 0) & (node_G != rail.rank)
        plan = plan_routes(node_G.where(goes_NG, rail.ranks), rail.ranks)
        count_G2 = torch.stack([plan.count_E, routes_NG.sum(0)], 1)  # rows that go there, and routes that end there
        counts = rail.counts(torch.cat([count_G2[: rail.rank], count_G2[rail.rank + 1 :]]))
        # Here the host waits for the device, and once more in the flat dispatch.
        numbers = torch.cat([count_G2, counts.wait()]).tolist()
        of_nodes, in_J = numbers[: rail.ranks], numbers[rail.ranks :]
        out_J = rail.others(of_nodes)
        plan = plan.trimmed(sum(rows for rows, _ in out_J))
        home = End([rows for rows, _ in out_J], len(plan.row_R))
        there = End([rows for rows, _ in in_J], sum(rows for rows, _ in in_J))

        expert_RK = expert_NK.index_select(0, plan.row_R).int()
        arrived = travel(rail, home, there, permute(x_ND, plan), permute(gate_NK, plan), expert_RK)
        x_WD, gate_WK, expert_WK = (torch.cat(both) for both in zip((x_ND, gate_NK, expert_NK), arrived, strict=True))
        expert_WK = expert_WK - rail.rank * each
        here_WK = (expert_WK >= 0) & (expert_WK < each)
        expert_WK, gate_WK = (t.where(here_WK, 0) for t in (expert_WK, gate_WK))
        routes = of_nodes[rail.rank][1] + sum(routes for _, routes in in_J)
        y_WD = self._flat.through(x_WD, expert_WK, gate_WK, experts.backend(x_ND, weights), weights, routes)
        y_ND, y_SD = torch.split(y_WD, [len(x_ND), there.rows])
        (sum_RD,) = travel(rail, there, home, y_SD)
        return y_ND + combine(sum_RD, goes_NG.to(gate_NK), plan)
