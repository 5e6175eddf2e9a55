"""Expert-parallel dispatch: rows to the ranks that hold their experts, and the outputs back.

Uneven and dropless. A rank with no rows to send or none received takes part in every exchange, forward and backward.
Suffixes beside the kernels' own: S routes received here, P ranks of the group, X experts held by one rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from mhmoe_kernels import combine, permute, plan_routes
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.router import Routing


class ExpertParallelDispatch:
    """A `model.moe.Dispatch` over a process group whose rank p holds experts p * E/P .. (p + 1) * E/P - 1."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._ranks = group, dist.get_world_size(group)

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        held = len(experts.held)
        plan = plan_routes(routing.expert_NK, held * self._ranks)
        sent_PX = plan.count_E.view(self._ranks, held)
        received_PX = torch.empty_like(sent_PX)
        dist.all_to_all_single(received_PX, sent_PX, group=self._group)
        # The one place where the host waits: splits must be numbers.
        sent, received = sent_PX.sum(1).tolist(), received_PX.sum(1).tolist()

        if torch.is_autocast_enabled(x_ND.device.type):
            x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
        rows_SD = self._exchange(permute(x_ND, plan), sent, received)
        # From each rank, rows come sorted by expert.
        expert_S = torch.arange(held, device=x_ND.device).repeat(self._ranks).repeat_interleave(received_PX.flatten())
        gate_S1 = torch.ones(len(rows_SD), 1, dtype=torch.float32, device=x_ND.device)
        out_SD = experts(rows_SD, expert_S[:, None], gate_S1)
        return combine(self._exchange(out_SD, received, sent), routing.gate_NK, plan)

    def _exchange(self, rows: Tensor, outgoing: list[int], incoming: list[int]) -> Tensor:
        result: Tensor = all_to_all_single_autograd(rows, incoming, outgoing, self._group)
        return result
