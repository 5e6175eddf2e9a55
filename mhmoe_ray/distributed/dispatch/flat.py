"""Each route's row goes straight to the rank that holds its expert.

A rank's own rows enter no exchange: both ways, its experts work on them while the rows of others are in flight.

    forward     counts out | permute, read counts | rows out      | experts on own rows | on theirs | outputs back
    backward                                        gradients out | the same            | the same  | gradients back

All from rows to outputs is one autograd Function, which runs its parts itself. Autograd would run them in the reverse
of the order that they were made in, and so wait for the others' rows before it works on its own.

Here R rows are sorted by expert, with this rank's own experts first and dropped routes last.
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
        """Args:
        group: of this rank.
        nodes: for each rank of the group, what names its node; by default all are on one.
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
        """y_n, the sum of its experts' outputs weighted by gates.

        Args:
            x_ND: rows, in the dtype of the weights.
            expert_NK: int64, in 0..E-1 of the group's experts.
            gate_NK: 0 for a route that was dropped.
            backend, weights: of the experts held here.
            routes: how many were not dropped, where this is known: others then take no memory.
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
        """Experts renamed so that a sort puts those held here first, the others in their order, dropped routes last."""
        e, first = torch.arange(held * self.ranks, device=expert_NK.device), self._exchange.rank * held
        label_E = torch.cat([e[held : held + first], e[:held], e[held + first :]])
        return label_E[expert_NK].masked_fill(gate_NK == 0, len(e))


class _Crossing(NamedTuple):
    """The way of sorted rows through the experts of all ranks, for outputs and for gradients alike."""

    send: Callable[[Tensor, Tensor, list[int], list[int]], Flight]
    own_X: list[int]
    """Rows of this rank for its own experts."""
    out_JX: list[list[int]]
    """Rows for each other rank's experts."""
    in_JX: list[list[int]]
    """Rows from each other rank."""

    def __call__(
        self, x_RD: Tensor, on_own: Callable[[Tensor], Tensor], on_theirs: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """R results in the order of x_RD, 0 for dropped routes.

        Args:
            x_RD: rows, or gradients of outputs.
            on_own, on_theirs: what this rank's experts make of rows of its own, and of the others' rows. Both get them
                sorted by expert.
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
    """Blocks of rows, which lie in the order of A, then of B, put in the order of B, then of A: ranks and experts, or
    experts and ranks.

    So the rows of several ranks, each sorted by expert, become one run of rows an expert. It copies blocks, which costs
    at most some per cent of the experts' work; a product for each rank's block was slower at any number of ranks.
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
    """The experts of this rank on some rows, and back: a graph of its own for each, to be run when rows are here."""

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
