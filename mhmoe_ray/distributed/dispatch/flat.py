"""Flat dispatch: each route's row goes straight to the rank that holds its expert.

A rank's own rows enter no exchange: forward and backward, its experts work on them while other ranks' rows are in
flight.

    forward     counts out | permute, read counts | rows out      | experts on own rows | on theirs | outputs back
    backward                                        gradients out | the same            | the same  | gradients back

All steps from rows to outputs are one autograd Function, which runs its parts itself. Autograd would run the parts in
the reverse of the order in which they were made, and so wait for the others' rows before it works on its own.

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
from mhmoe_ray.distributed.dispatch.exchange import Exchange, Flight
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.router import Routing


class FlatDispatch:
    """A `model.feedforward.Dispatch` over a process group whose rank p holds experts p * E/P .. (p + 1) * E/P - 1."""

    def __init__(self, group: dist.ProcessGroup, nodes: Sequence[object] | None = None) -> None:
        """Prepare dispatch within an expert-parallel group.

        Args:
            group: expert-parallel process group of this rank.
            nodes: name of the node of each rank of the group, of any type; by default all ranks are on one node.
        """
        self._exchange = Exchange(group, nodes)
        self.ranks, self.pop_sent = self._exchange.ranks, self._exchange.pop_sent
        self.pop_waited = self._exchange.pop_waited

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        x_ND, weights = experts.cast(x_ND)
        return self.through(x_ND, routing.expert_NK, routing.gate_NK, experts.backend(x_ND, weights), weights)

    def through(
        self,
        x_ND: Tensor,
        expert_NK: Tensor,
        gate_NK: Tensor,
        backend: str,
        weights: ExpertWeights,
        routes: int | None = None,
    ) -> Tensor:
        """Return y_n, the sum of the outputs of each row's experts weighted by gates.

        Args:
            x_ND: rows, in the dtype of the weights.
            expert_NK: expert numbers, int64, in 0..E-1 of the group's experts.
            gate_NK: gates of the routes; 0 for a route that was dropped.
            backend: kernel backend that runs the experts.
            weights: weights of the experts that this rank holds.
            routes: number of routes that were not dropped, where this is known: the others then take no memory.
        """
        held = len(weights.stacked[0])
        plan = plan_routes(self._labels(expert_NK, gate_NK, held), held * self.ranks)
        count_PX = plan.count_E.view(-1, held)  # of this rank, then of the others
        counts = self._exchange.counts(count_PX[1:])
        if routes is not None:
            plan = plan.trimmed(routes)
        x_RD = permute(x_ND, plan)
        # The one place where the host waits for the device: splits must be numbers.
        own_X, *rest = torch.cat([count_PX, counts.wait()]).tolist()
        crossing = _Crossing(self._exchange.rows, own_X, rest[: self.ranks - 1], rest[self.ranks - 1 :])
        out_RD = _through_experts(x_RD, crossing, backend, weights)
        return combine(out_RD, gate_NK, plan)

    def _labels(self, expert_NK: Tensor, gate_NK: Tensor, held: int) -> Tensor:
        """Renumber experts so that a sort puts those of this rank first, the others in their order, and dropped routes
        last."""
        e, first = torch.arange(held * self.ranks, device=expert_NK.device), self._exchange.rank * held
        label_E = torch.cat([e[held : held + first], e[:held], e[held + first :]])
        return label_E[expert_NK].masked_fill(gate_NK == 0, len(e))


class _Crossing(NamedTuple):
    """Path of sorted rows through the experts of all ranks and back, the same for outputs and for gradients."""

    send: Callable[[Tensor, Tensor, list[int], list[int]], Flight]
    own_X: list[int]
    """Number of this rank's rows for each of its own experts."""
    out_JX: list[list[int]]
    """Number of this rank's rows for each expert of each other rank."""
    in_JX: list[list[int]]
    """Number of rows from each other rank for each expert of this rank."""

    def __call__(
        self, x_RD: Tensor, on_own: Callable[[Tensor], Tensor], on_theirs: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return R results in the order of x_RD, 0 for dropped routes.

        Args:
            x_RD: rows, or gradients of outputs.
            on_own: function that applies this rank's experts to its own rows, sorted by expert.
            on_theirs: function that applies this rank's experts to the other ranks' rows, sorted by expert.
        """
        out_J, in_J = [sum(count_X) for count_X in self.out_JX], [sum(count_X) for count_X in self.in_JX]
        own = sum(self.own_X)
        end = own + sum(out_J)
        there = self.send(x_RD[own:end], x_RD.new_empty(sum(in_J), x_RD.shape[1]), out_J, in_J)
        y_own = on_own(x_RD[:own])
        y_SD = on_theirs(_transpose(there.wait(), self.in_JX))
        y_RD = y_SD.new_empty(x_RD.shape)
        back = self.send(_transpose(y_SD, list(zip(*self.in_JX, strict=True))), y_RD[own:end], in_J, out_J)
        y_RD[:own] = y_own
        y_RD[end:] = 0
        back.wait()
        return y_RD


def _transpose(rows: Tensor, counts_AB: Sequence[Sequence[int]]) -> Tensor:
    """Reorder blocks of rows from the order (A, B) to (B, A), where A and B are ranks and experts, or experts and
    ranks.

    So the rows of several ranks, each sorted by expert, become one run of rows per expert. This copies blocks, which
    costs at most some per cent of the experts' work; a product for each rank's block was slower at any number of ranks.

    Args:
        rows: blocks of rows, in the order of A, then of B.
        counts_AB: number of rows of each block.
    """
    if len(counts_AB) < 2 or len(counts_AB[0]) < 2:
        return rows
    blocks = torch.split(rows, [count for counts_B in counts_AB for count in counts_B])
    B = len(counts_AB[0])
    return torch.cat([block for b in range(B) for block in blocks[b::B]])


def _through_experts(x_RD: Tensor, crossing: _Crossing, backend: str, weights: ExpertWeights) -> Tensor:
    differentiable = torch.is_grad_enabled()  # never so within a Function
    return _experts(x_RD, crossing, backend, weights, differentiable, *weights.stacked)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        crossing: _Crossing,
        backend: str,
        weights: ExpertWeights,
        differentiable: bool,
        *stacked: Tensor,
    ) -> Tensor:
        leaves = weights._replace(stacked=tuple(w.detach().requires_grad_(differentiable) for w in stacked))
        own_X, their_X = crossing.own_X, [sum(count_J) for count_J in zip(*crossing.in_JX, strict=True)]
        their_X = their_X or [0] * len(own_X)  # there may be no others
        ctx.crossing = crossing
        ctx.own, ctx.theirs = (_Part(backend, count_X, leaves) for count_X in (own_X, their_X))
        # A copy, since a view would keep all R rows in memory until the backward.
        return crossing(x_RD, lambda x: ctx.own.forward(x.clone()), ctx.theirs.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        own, theirs = ctx.own, ctx.theirs
        del ctx.own, ctx.theirs  # ctx lives as long as the loss does
        dx_RD = ctx.crossing(dy_RD.contiguous(), own.backward, theirs.backward)
        dstacked = (a.add_(b) for a, b in zip(own.dstacked, theirs.dstacked, strict=True))
        return dx_RD, None, None, None, None, *dstacked


_experts: Callable[..., Tensor] = _Experts.apply


class _Part:
    """The experts of this rank on one set of rows, forward and backward.

    Each part has an autograd graph of its own, so that it can run as soon as its rows are on this rank.
    """

    def __init__(self, backend: str, count_X: list[int], weights: ExpertWeights) -> None:
        self._backend, self._count_X, self._weights = backend, count_X, weights
        self.dstacked: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        differentiable = self._weights.stacked[0].requires_grad
        with torch.set_grad_enabled(differentiable):
            x = x.detach().requires_grad_(differentiable)
            y = run_sorted_experts(self._backend, x, self._count_X, self._weights)
        if differentiable:
            # Not y itself, whose values no one needs again.
            self._x, self._edge = x, get_gradient_edge(y)
        return y.detach()

    def backward(self, dy: Tensor) -> Tensor:
        inputs = (self._x, *self._weights.stacked)
        dx, *dstacked = torch.autograd.grad(self._edge, inputs, dy, materialize_grads=True)
        self.dstacked = tuple(dstacked)
        return dx
