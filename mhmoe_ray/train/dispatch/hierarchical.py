"""Between nodes first, then within them: a row crosses the slow links once for each node that has experts for it.

The ranks of a group are M nodes of L ranks each, in order, so that a node holds a range of experts. A rank's rail is
the rank of its place on every node. Along the rail a row goes to each other node with an expert for it, with its gates
and the numbers of its experts. There a rank dispatches it flat over its node, to that node's experts alone, as it does
with its own rows for the experts at home. One sum of weighted outputs comes back for each row that was sent, and is
added where the row came from.

    forward     counts | rows set out           | own rows, flat       | theirs, flat      | sums back  | added
    backward             gradients of sums out  | theirs, flat         | gradients of rows and gates back, meanwhile own

So a row of two experts on another node crosses once each way instead of twice, but may go on to a neighbour there; and
a sum in bfloat16 is rounded once more than in flat dispatch. The host waits for the device three times instead of once.
Where routes are rows of their own, as under dropout (`model/moe.py`), there is nothing to save.

The idea is that of DeepSpeed-MoE's hierarchical all-to-all (arXiv 2201.05596, section 5.3) and of DeepSeek-V3's
node-limited dispatch (arXiv 2412.19437, section 3.2.2), here without a limit of nodes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_kernels import combine, permute, plan_routes
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.router import Routing
from mhmoe_ray.train.dispatch.exchange import Exchange, Sent
from mhmoe_ray.train.dispatch.flat import FlatDispatch
from mhmoe_ray.train.dispatch.trip import End, Trip


class HierarchicalDispatch:
    """A `model.feedforward.Dispatch` over M x L ranks, of which the l-th on node m holds the (m * L + l)-th share of
    the experts."""

    def __init__(self, node: dist.ProcessGroup, rail: dist.ProcessGroup) -> None:
        """Args:
        node: the ranks of this rank's node, in the order of their shares.
        rail: the ranks of this rank's place on each node, in the order of nodes.
        """
        self._flat = FlatDispatch(node)
        self._rail = Exchange(rail, nodes=range(dist.get_world_size(rail)))

    def pop_sent(self) -> Sent:
        """What was sent since this was last asked."""
        return self._rail.pop_sent().plus(self._flat.pop_sent())

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        x_ND, weights = experts.cast(x_ND)
        backend = experts.backend(x_ND, weights)
        rail, expert_NK, gate_NK = self._rail, routing.expert_NK, routing.gate_NK
        each = len(experts.held) * self._flat.ranks

        def through(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, routes: int) -> Tensor:
            """Rows to the experts of this node, so many routes in all."""
            expert_NK = expert_NK - rail.rank * each
            here_NK = (expert_NK >= 0) & (expert_NK < each)
            expert_NK, gate_NK = (t.where(here_NK, 0) for t in (expert_NK, gate_NK))
            return self._flat.through(x_ND, expert_NK, gate_NK, backend, weights, routes)

        # A row goes to the nodes of its kept routes as it goes to experts elsewhere, with weight 1.
        node_M = torch.arange(rail.ranks, device=x_ND.device)
        node_NK = (expert_NK // each).masked_fill(gate_NK == 0, rail.ranks)
        routes_NM = (node_NK[..., None] == node_M).sum(1)
        goes_NM = (routes_NM > 0) & (node_M != rail.rank)
        plan = plan_routes(node_M.where(goes_NM, rail.ranks), rail.ranks)
        count_M2 = torch.stack([plan.count_E, routes_NM.sum(0)], 1)  # rows that go, and routes of these
        counts = rail.counts(torch.cat([count_M2[: rail.rank], count_M2[rail.rank + 1 :]]))
        # Here the host waits for the device, and again in each flat dispatch.
        numbers = torch.cat([count_M2, counts.wait()]).tolist()
        out_M, in_Q = numbers[: rail.ranks], numbers[rail.ranks :]
        out_Q, (_, own_routes) = rail.others(out_M), out_M[rail.rank]
        sent, received = sum(rows for rows, _ in out_Q), sum(rows for rows, _ in in_Q)
        plan = plan.trimmed(sent)
        home = End([rows for rows, _ in out_Q], len(plan.row_R))
        there = End([rows for rows, _ in in_Q], received)

        away = Trip(rail, home, there)
        rows = (permute(x_ND, plan), permute(gate_NK, plan), expert_NK.index_select(0, plan.row_R).int())
        token = away.start(*rows)
        y_ND = through(x_ND, expert_NK, gate_NK, own_routes)
        x_SD, gate_SK, expert_SK = away.finish(token)
        y_SD = through(x_SD, expert_SK.long(), gate_SK, sum(routes for _, routes in in_Q))
        back = Trip(rail, there, home)
        (sum_RD,) = back.finish(back.start(y_SD))
        return y_ND + combine(sum_RD, goes_NM.to(gate_NK), plan)
