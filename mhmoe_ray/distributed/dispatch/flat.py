"""Flat dispatch: for each choice of an expert (route), the row goes directly to the rank that holds this expert.

Rows for a rank's own experts enter no exchange: they are computed, forward and backward, while other rows are sent. A
shared expert is computed while results travel back.

    forward     counts out | permute, read counts | rows out      | own rows | received rows | outputs back   | shared
    backward                                        gradients out | the same | the same      | gradients back | shared

In this module R rows are sorted by expert, with this rank's own experts first and dropped routes last.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels import ExpertWeights, Function, combine, permute, plan_routes, run_sorted_experts
from mhmoe_ray.distributed.dispatch.exchange import PendingExchange, RowExchange
from mhmoe_ray.distributed.dispatch.inner_pass import (
    InnerPass,
    SharedPass,
    restore_saved,
    shared_arguments,
    take_all_saved,
)
from mhmoe_ray.model.feedforward import Experts, SharedExpert
from mhmoe_ray.model.router import Routing


class FlatDispatch:
    """Flat dispatch, a `model.feedforward.Dispatch`. Rank p of the group holds experts p * E/P .. (p + 1) * E/P - 1."""

    def __init__(self, group: dist.ProcessGroup, nodes: Sequence[object] | None = None) -> None:
        self._exchange = RowExchange(group, nodes)
        self.ranks, self.pop_sent_bytes = self._exchange.ranks, self._exchange.pop_sent_bytes
        self.pop_wait_seconds = self._exchange.pop_wait_seconds

    def __call__(
        self, x_ND: Tensor, routing: Routing, experts: Experts, shared: SharedExpert | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x_ND, weights = experts.cast_rows(x_ND)
        kernel = experts.select_kernel(x_ND, weights)
        return self.dispatch_rows(x_ND, routing.expert_NK, routing.gate_NK, kernel, weights, shared)

    def dispatch_rows(
        self,
        x_ND: Tensor,
        expert_NK: Tensor,
        gate_NK: Tensor,
        kernel: str,
        weights: ExpertWeights,
        shared: SharedExpert | None = None,
        routes: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Send rows to their experts' ranks; return each row's weighted sum of outputs, and the shared output if any.

        Rows have the dtype of the weights. `expert_NK` counts the group's experts, 0..E-1, in int64; a gate of 0 marks
        a dropped route. With `routes`, the number of routes that were not dropped, dropped routes take no memory. The
        shared expert is computed while rows travel.
        """
        local_experts = len(weights.stacked[0])
        plan = plan_routes(self._sort_labels(expert_NK, gate_NK, local_experts), local_experts * self.ranks)
        # Routes are sorted with this rank's own experts first, so row 0 of these counts belongs to this rank.
        count_PX = plan.count_E.view(-1, local_experts)
        counts = self._exchange.start_counts(count_PX[1:])
        if routes is not None:
            plan = plan.trimmed(routes)
        x_RD = permute(x_ND, plan)
        # This is the only place where the host waits for the device: the all-to-all needs its split sizes as numbers on
        # the host.
        own_X, *other_counts = torch.cat([count_PX, counts.wait()]).tolist()
        round_trip = _RoundTrip(
            self._exchange.start_rows, own_X, other_counts[: self.ranks - 1], other_counts[self.ranks - 1 :]
        )
        out_RD, y_BTM = _run_experts(x_RD, round_trip, kernel, weights, shared)
        return combine(out_RD, gate_NK, plan), y_BTM

    def _sort_labels(self, expert_NK: Tensor, gate_NK: Tensor, n_local: int) -> Tensor:
        """Return each route's sort key: own experts first, then others in order, dropped routes last."""
        id_E, start = torch.arange(n_local * self.ranks, device=expert_NK.device), self._exchange.rank * n_local
        label_E = torch.cat([id_E[n_local : n_local + start], id_E[:n_local], id_E[n_local + start :]])
        return label_E[expert_NK].masked_fill(gate_NK == 0, len(id_E))


class _RoundTrip(NamedTuple):
    """Round trip of sorted rows, or of gradients, to the experts of all ranks."""

    start_exchange: Callable[[Tensor, Tensor, list[int], list[int]], PendingExchange]
    own_X: list[int]  # this rank's rows for each of its own experts
    out_JX: list[list[int]]  # this rank's rows for each expert of each other rank
    in_JX: list[list[int]]  # rows from each other rank for each expert of this rank

    def __call__(
        self,
        x_RD: Tensor,
        compute_own: Callable[[Tensor], Tensor],
        compute_received: Callable[[Tensor], Tensor],
        compute_meanwhile: Callable[[], None],
    ) -> Tensor:
        """Send sorted rows, compute, and return the results in the same order, 0 for dropped routes. Expert functions
        get rows sorted by expert. `compute_meanwhile` runs while results travel back."""
        out_J, in_J = [sum(count_X) for count_X in self.out_JX], [sum(count_X) for count_X in self.in_JX]
        own_rows = sum(self.own_X)
        end = own_rows + sum(out_J)
        outgoing = self.start_exchange(x_RD[own_rows:end], x_RD.new_empty(sum(in_J), x_RD.shape[1]), out_J, in_J)
        y_own = compute_own(x_RD[:own_rows])
        y_SD = compute_received(_transpose_blocks(outgoing.wait(), self.in_JX))
        y_RD = y_SD.new_empty(x_RD.shape)
        returning = self.start_exchange(
            _transpose_blocks(y_SD, list(zip(*self.in_JX, strict=True))), y_RD[own_rows:end], in_J, out_J
        )
        y_RD[:own_rows] = y_own
        y_RD[end:] = 0
        compute_meanwhile()
        returning.wait()
        return y_RD


def _transpose_blocks(rows: Tensor, counts_AB: Sequence[Sequence[int]]) -> Tensor:
    """Reorder rows sorted by A, then B, by B, then A; A and B are the rank and the expert of a row, or the reverse."""
    # The copy makes the rows of each expert contiguous. It takes at most a few per cent of the experts' time. The
    # alternative, a matrix product for each rank's block, was slower at any number of ranks.
    if len(counts_AB) < 2 or len(counts_AB[0]) < 2:
        return rows
    blocks = torch.split(rows, [count for row_counts in counts_AB for count in row_counts])
    B = len(counts_AB[0])
    return torch.cat([block for b in range(B) for block in blocks[b::B]])


def _run_experts(
    x_RD: Tensor, round_trip: _RoundTrip, kernel: str, weights: ExpertWeights, shared: SharedExpert | None
) -> tuple[Tensor, Tensor | None]:
    """Return the output of each sorted row, 0 for dropped routes, and that of the shared expert, if any."""
    stacked, weights = weights.stacked, weights._replace(stacked=())
    shared_function, shared_tensors = shared_arguments(shared)
    # `torch.is_grad_enabled()` is called here, because gradients are always disabled inside an autograd function.
    settings = _Settings(kernel, weights, len(stacked), shared_function, torch.is_grad_enabled())
    y_RD, *shared_outputs = _apply_experts(round_trip, settings, x_RD, *stacked, *shared_tensors)
    return y_RD, shared_outputs[0] if shared_outputs else None


class _Settings(NamedTuple):
    """Arguments of `_ExpertsFunction` that are not tensors."""

    kernel: str
    weights: ExpertWeights  # function and options; autograd needs the tensors as arguments of `_ExpertsFunction`
    weight_count: int
    shared_function: Function | None
    differentiable: bool  # whether there will be a backward

    def expert_pass(self, counts: list[int], stacked: Sequence[Tensor]) -> InnerPass:
        kernel, weights = self.kernel, self.weights

        def run(x: Tensor, *stacked: Tensor) -> Tensor:
            return run_sorted_experts(kernel, x, counts, weights._replace(stacked=stacked))

        return InnerPass(run, stacked, self.differentiable)


# A single autograd function runs all steps from rows to outputs. With a function for each step, autograd would run
# their backwards in reverse order, and so wait for received rows before it works on the rank's own rows.
class _ExpertsFunction(torch.autograd.Function):
    """Autograd function of `_run_experts`."""

    @staticmethod
    def forward(
        ctx: Any, round_trip: _RoundTrip, settings: _Settings, x_RD: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        stacked, shared_tensors = tensors[: settings.weight_count], tensors[settings.weight_count :]
        own_X, received_X = round_trip.own_X, [sum(count_J) for count_J in zip(*round_trip.in_JX, strict=True)]
        # Without other ranks `received_X` is an empty list, but each expert needs a count.
        received_X = received_X or [0] * len(own_X)
        own_pass, received_pass = (settings.expert_pass(counts, stacked) for counts in (own_X, received_X))
        shared = SharedPass(settings.shared_function, shared_tensors, settings.differentiable)
        shared_outputs: list[Tensor] = []
        # The rank's own rows are cloned, because a view would keep all R rows in memory until the backward.
        y_RD = round_trip(
            x_RD,
            lambda x: own_pass.forward(x.clone()),
            received_pass.forward,
            lambda: shared_outputs.extend(shared.forward()),
        )
        ctx.round_trip, ctx.passes = round_trip, (own_pass, received_pass, shared)
        ctx.save_for_backward(*take_all_saved([own_pass, received_pass, *shared.passes]))
        return y_RD, *shared_outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor, *dy_shared: Tensor) -> tuple[Tensor | None, ...]:
        own_pass, received_pass, shared = ctx.passes
        # ctx lives as long as the loss. The saved rows are needed only in this call, so ctx must not keep them.
        del ctx.passes
        restore_saved([own_pass, received_pass, *shared.passes], list(ctx.saved_tensors))
        compute_shared = partial(shared.backward, dy_shared)
        dx_RD = ctx.round_trip(dy_RD.contiguous(), own_pass.backward, received_pass.backward, compute_shared)
        dstacked = (a.add_(b) for a, b in zip(own_pass.dweights, received_pass.dweights, strict=True))
        return None, None, dx_RD, *dstacked, *shared.gradients


_apply_experts: Callable[..., tuple[Tensor, ...]] = _ExpertsFunction.apply
