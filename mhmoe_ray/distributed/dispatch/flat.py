"""Flat dispatch: each route's row goes directly to the rank that holds its expert.

A rank's own rows enter no exchange. Forward and backward, its experts compute on them while the rows of other ranks are
being sent.

    forward     counts out | permute, read counts | rows out      | experts: own rows | received rows | outputs back
    backward                                        gradients out | the same          | the same      | gradients back

In this module R rows are sorted by expert, with this rank's own experts first and dropped routes last.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from mhmoe_kernels import ExpertWeights, combine, permute, plan_routes, run_sorted_experts
from mhmoe_ray.distributed.dispatch.exchange import Exchange, PendingExchange
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.router import Routing


class FlatDispatch:
    """Flat dispatch, a `model.feedforward.Dispatch`: each route's row goes directly to the rank that holds its expert.

    Rank p of the process group holds experts p * E/P .. (p + 1) * E/P - 1.
    """

    def __init__(self, group: dist.ProcessGroup, nodes: Sequence[object] | None = None) -> None:
        """Prepare dispatch within an expert-parallel group.

        Args:
            group: expert-parallel process group of this rank.
            nodes: identifier of each rank's node, of any type; by default all ranks are on one node.
        """
        self._exchange = Exchange(group, nodes)
        self.ranks, self.pop_sent_bytes = self._exchange.ranks, self._exchange.pop_sent_bytes
        self.pop_wait_seconds = self._exchange.pop_wait_seconds

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        x_ND, weights = experts.cast_rows(x_ND)
        return self.dispatch_rows(
            x_ND, routing.expert_NK, routing.gate_NK, experts.select_kernel(x_ND, weights), weights
        )

    def dispatch_rows(
        self,
        x_ND: Tensor,
        expert_NK: Tensor,
        gate_NK: Tensor,
        kernel: str,
        weights: ExpertWeights,
        routes: int | None = None,
    ) -> Tensor:
        """Send rows to the ranks of their experts, and return each row's sum of expert outputs weighted by gates.

        Args:
            x_ND: rows, in the dtype of the weights.
            expert_NK: expert numbers, int64, in 0..E-1 of the group's experts.
            gate_NK: gates of the routes; 0 for a route that was dropped.
            kernel: name of the kernel that runs the experts.
            weights: weights of the experts that this rank holds.
            routes: number of routes that were not dropped. If it is given, dropped routes take no memory.
        """
        local_experts = len(weights.stacked[0])
        plan = plan_routes(self._sort_labels(expert_NK, gate_NK, local_experts), local_experts * self.ranks)
        # Row 0 of these counts belongs to this rank, because the labels of its own experts come first.
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
        out_RD = _run_experts(x_RD, round_trip, kernel, weights)
        return combine(out_RD, gate_NK, plan)

    def _sort_labels(self, expert_NK: Tensor, gate_NK: Tensor, n_local: int) -> Tensor:
        """Return a label for each route. Sorted by labels, routes to this rank's experts are first, those to other
        experts follow in the order of experts, and dropped routes are last."""
        id_E, start = torch.arange(n_local * self.ranks, device=expert_NK.device), self._exchange.rank * n_local
        label_E = torch.cat([id_E[n_local : n_local + start], id_E[:n_local], id_E[n_local + start :]])
        return label_E[expert_NK].masked_fill(gate_NK == 0, len(id_E))


class _RoundTrip(NamedTuple):
    """Round trip of sorted rows, or of gradients in the backward, to the experts of all ranks and back."""

    start_exchange: Callable[[Tensor, Tensor, list[int], list[int]], PendingExchange]
    own_X: list[int]
    """Number of this rank's rows for each of its own experts."""
    out_JX: list[list[int]]
    """Number of this rank's rows for each expert of each other rank."""
    in_JX: list[list[int]]
    """Number of rows from each other rank for each expert of this rank."""

    def __call__(
        self, x_RD: Tensor, compute_own: Callable[[Tensor], Tensor], compute_received: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Send rows to the ranks of their experts, compute, and return the R results in the order of x_RD, with 0 for
        dropped routes.

        Args:
            x_RD: rows, or gradients of outputs.
            compute_own: function that applies this rank's experts to its own rows, sorted by expert.
            compute_received: function that applies this rank's experts to the received rows, sorted by expert.
        """
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
        returning.wait()
        return y_RD


def _transpose_blocks(rows: Tensor, counts_AB: Sequence[Sequence[int]]) -> Tensor:
    """Return blocks of rows in the order of B, then of A, where A and B are ranks and experts, or experts and ranks.

    Args:
        rows: blocks of rows, in the order of A, then of B.
        counts_AB: number of rows of each block.
    """
    # The copy makes the rows of each expert contiguous. It takes at most some per cent of the experts' time; the
    # alternative, a matrix product for each rank's block, was slower at any number of ranks.
    if len(counts_AB) < 2 or len(counts_AB[0]) < 2:
        return rows
    blocks = torch.split(rows, [count for row_counts in counts_AB for count in row_counts])
    B = len(counts_AB[0])
    return torch.cat([block for b in range(B) for block in blocks[b::B]])


def _run_experts(x_RD: Tensor, round_trip: _RoundTrip, kernel: str, weights: ExpertWeights) -> Tensor:
    """Return the output of the expert of each sorted row, with gradients; 0 for dropped routes."""
    # `_ExpertsFunction` gets this flag as an argument, because gradients are always disabled inside an autograd
    # function.
    differentiable = torch.is_grad_enabled()
    return _apply_experts(x_RD, round_trip, kernel, weights, differentiable, *weights.stacked)


# A single autograd function runs all steps from rows to outputs. With a function for each step, autograd would run
# their backwards in reverse order, and so wait for received rows before it works on the rank's own rows.
class _ExpertsFunction(torch.autograd.Function):
    """Autograd function of `_run_experts`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        round_trip: _RoundTrip,
        kernel: str,
        weights: ExpertWeights,
        differentiable: bool,
        *stacked: Tensor,
    ) -> Tensor:
        own_X, received_X = round_trip.own_X, [sum(count_J) for count_J in zip(*round_trip.in_JX, strict=True)]
        # Without other ranks `received_X` is an empty list, but each expert needs a count.
        received_X = received_X or [0] * len(own_X)
        plain_weights = weights._replace(stacked=stacked)
        ctx.round_trip = round_trip
        ctx.own_pass, ctx.received_pass = (
            _ExpertPass(kernel, count_X, plain_weights, differentiable) for count_X in (own_X, received_X)
        )
        # The own rows are cloned, because a view would keep all R rows in memory until the backward.
        y_RD = round_trip(x_RD, lambda x: ctx.own_pass.forward(x.clone()), ctx.received_pass.forward)
        ctx.save_for_backward(*ctx.own_pass.take_saved(), *ctx.received_pass.take_saved())
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        own_pass, received_pass = ctx.own_pass, ctx.received_pass
        # ctx lives as long as the loss. The saved rows are needed only in this call, so ctx must not keep them.
        del ctx.own_pass, ctx.received_pass
        saved_tensors = list(ctx.saved_tensors)
        received_pass.saved_tensors = saved_tensors[own_pass.saved_count :]
        own_pass.saved_tensors = saved_tensors[: own_pass.saved_count]
        del saved_tensors
        dx_RD = ctx.round_trip(dy_RD.contiguous(), own_pass.backward, received_pass.backward)
        dstacked = (a.add_(b) for a, b in zip(own_pass.dstacked, received_pass.dstacked, strict=True))
        return dx_RD, None, None, None, None, *dstacked


_apply_experts: Callable[..., Tensor] = _ExpertsFunction.apply


class _ExpertPass:
    """Forward and backward of this rank's experts on one set of rows, with an autograd graph of its own.

    The graph has no tensors: the outer function saves them, so that a recomputed block frees them after its forward and
    computes them again.
    """

    def __init__(self, kernel: str, count_X: list[int], weights: ExpertWeights, differentiable: bool) -> None:
        """Prepare a pass.

        Args:
            kernel: name of the kernel.
            count_X: number of rows of each expert.
            weights: weights of this rank's experts.
            differentiable: whether there will be a backward.
        """
        self._kernel, self._count_X, self._weights = kernel, count_X, weights
        self._differentiable = differentiable
        self.saved_tensors: list[Tensor] = []
        """Tensors that the graph needs in its backward."""
        self.saved_count = 0
        self.dstacked: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the experts for rows that are sorted by expert."""
        if not self._differentiable:
            return run_sorted_experts(self._kernel, x, self._count_X, self._weights)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._save, self._load):
            anchor = torch.empty(0, device=x.device, requires_grad=True)
            x, *stacked = _start_graph(anchor, x, *self._weights.stacked)
            self._input_edges = [get_gradient_edge(t) for t in (x, *stacked)]
            y = run_sorted_experts(self._kernel, x, self._count_X, self._weights._replace(stacked=tuple(stacked)))
        # The backward needs only the gradient edge. A reference to y would keep values in memory that nothing reads.
        self._edge = get_gradient_edge(y)
        return y.detach()

    def take_saved(self) -> list[Tensor]:
        """Return the tensors that the backward needs, and keep them no longer."""
        saved_tensors, self.saved_tensors = self.saved_tensors, []
        self.saved_count = len(saved_tensors)
        # The weights are among the saved tensors if the backward needs them.
        del self._weights
        return saved_tensors

    def backward(self, dy: Tensor) -> Tensor:
        """Return the gradient of the rows. `saved_tensors` must be those of `take_saved`."""
        dx, *dstacked = torch.autograd.grad(self._edge, self._input_edges, dy)
        self.dstacked = tuple(dstacked)
        self.saved_tensors = []
        return dx

    def _save(self, tensor: Tensor) -> int:
        self.saved_tensors.append(tensor)
        return len(self.saved_tensors) - 1

    def _load(self, index: int) -> Tensor:
        return self.saved_tensors[index]


class _StartGraph(torch.autograd.Function):
    """Start of a graph whose inputs are not leaves. A leaf would stay in memory as long as the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(gradients))


_start_graph: Callable[..., tuple[Tensor, ...]] = _StartGraph.apply
