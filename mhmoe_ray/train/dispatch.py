"""Expert-parallel dispatch: rows to the ranks that hold their experts, and the outputs back.

Uneven and dropless. A rank with no rows to send or none received takes part in every exchange, forward and backward.
A rank's own rows enter no exchange: both ways, its experts work on them while the rows of others are in flight.

    forward     counts out | permute, read counts | rows out      | experts on own rows | on theirs | outputs back
    backward                                        gradients out | the same            | the same  | gradients back

All from rows to outputs is one autograd Function, which runs its parts itself. Autograd would run them in the reverse
of the order that they were made in, and so wait for the others' rows before it works on its own.

Suffixes beside the kernels' own: P ranks of the group, Q = P - 1 others in the order of their ranks, X experts held by
one rank, S rows received. R rows are sorted by expert, with this rank's own experts first and dropped routes last.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from mhmoe_kernels import ExpertWeights, combine, permute, plan_routes, run_sorted_experts
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.router import Routing


class Sent(NamedTuple):
    """Bytes that left this rank."""

    rows: int = 0
    """Rows, outputs, and the gradients of both."""
    counts: int = 0
    """Rows per expert, once a layer."""


def least_sent(count_LE: Tensor, held: range, row_bytes: int) -> int:
    """Bytes of rows that must leave ranks for the sake of this rank's tokens: each kept route of an expert elsewhere
    goes there and back, forward and backward, as a row of its own even where two go to one rank.

    Args:
        count_LE: kept routes of this rank's tokens.
        held: the experts that it holds.
        row_bytes: of one row as it travels.
    """
    elsewhere = count_LE.sum() - count_LE[:, held.start : held.stop].sum()
    return 4 * int(elsewhere) * row_bytes


class ExpertParallelDispatch:
    """A `model.feedforward.Dispatch` over a process group whose rank p holds experts p * E/P .. (p + 1) * E/P - 1.

    `sent` adds up what all calls and their backward passes send.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._ranks, self._rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.sent = Sent()

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        held, others = len(experts.held), self._ranks - 1
        plan = plan_routes(self._labels(routing, held), held * self._ranks)
        count_PX = plan.count_E.view(-1, held)  # of this rank, then of the others
        counts = self._send(count_PX[1:], torch.empty_like(count_PX[1:]), [1] * others, [1] * others)
        self.sent = self.sent._replace(counts=self.sent.counts + count_PX[1:].nbytes)
        x_ND, weights = experts.cast(x_ND)
        backend = experts.backend(x_ND, weights)
        x_RD = permute(x_ND, plan)
        # The one place where the host waits for the device: splits must be numbers.
        own_X, *rest = torch.cat([count_PX, counts.wait()]).tolist()
        crossing = _Crossing(self.send_rows, own_X, rest[:others], rest[others:])
        out_RD = _through_experts(x_RD, crossing, backend, weights)
        return combine(out_RD, routing.gate_NK, plan)

    def send_rows(self, rows: Tensor, into: Tensor, outgoing: list[int], incoming: list[int]) -> "_Flight":
        self.sent = self.sent._replace(rows=self.sent.rows + rows.nbytes)
        return self._send(rows, into, outgoing, incoming)

    def _send(self, rows: Tensor, into: Tensor, outgoing: list[int], incoming: list[int]) -> "_Flight":
        """Start to send `rows`, split over the other ranks, while theirs arrive in `into`."""
        at = self._rank
        arriving, leaving = ([*others[:at], 0, *others[at:]] for others in (incoming, outgoing))
        work = dist.all_to_all_single(into, rows, arriving, leaving, group=self._group, async_op=True)
        return _Flight(work, rows, into)

    def _labels(self, routing: Routing, held: int) -> Tensor:
        """Experts renamed so that a sort puts those held here first, the others in their order, dropped routes last."""
        e, first = torch.arange(held * self._ranks, device=routing.expert_NK.device), self._rank * held
        label_E = torch.cat([e[held : held + first], e[:held], e[held + first :]])
        return label_E[routing.expert_NK].masked_fill(routing.gate_NK == 0, len(e))


class _Flight(NamedTuple):
    """An exchange under way."""

    work: Any
    rows: Tensor
    """Held here until they have left: no other tensor may take their memory."""
    into: Tensor

    def wait(self) -> Tensor:
        self.work.wait()
        return self.into


class _Crossing(NamedTuple):
    """The way of sorted rows through the experts of all ranks, for outputs and for gradients alike."""

    send: Callable[[Tensor, Tensor, list[int], list[int]], _Flight]
    own_X: list[int]
    """Rows of this rank for its own experts."""
    out_QX: list[list[int]]
    """Rows for each other rank's experts."""
    in_QX: list[list[int]]
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
        out_Q, in_Q = [sum(count_X) for count_X in self.out_QX], [sum(count_X) for count_X in self.in_QX]
        own = sum(self.own_X)
        end = own + sum(out_Q)
        there = self.send(x_RD[own:end], x_RD.new_empty(sum(in_Q), x_RD.shape[1]), out_Q, in_Q)
        y_own = on_own(x_RD[:own])
        y_SD = on_theirs(_transpose(there.wait(), self.in_QX))
        y_RD = y_SD.new_empty(x_RD.shape)
        back = self.send(_transpose(y_SD, list(zip(*self.in_QX, strict=True))), y_RD[own:end], in_Q, out_Q)
        y_RD[:own] = y_own
        y_RD[end:] = 0
        back.wait()
        return y_RD


def _transpose(rows: Tensor, counts_AB: Sequence[Sequence[int]]) -> Tensor:
    """Blocks of rows, first those of A's first for each of B, put in the order of B, then of A.

    So the rows of several ranks, each sorted by expert, become one run of rows an expert. It copies blocks, which costs
    at most some per cent of the experts' work; a product for each rank's block was slower at any number of ranks.
    """
    A, B = len(counts_AB), len(counts_AB[0])
    if A == 1 or B == 1:
        return rows
    blocks = torch.split(rows, [count for counts_B in counts_AB for count in counts_B])
    return torch.cat([block for b in range(B) for block in blocks[b::B]])


def _through_experts(x_RD: Tensor, crossing: _Crossing, backend: str, weights: ExpertWeights) -> Tensor:
    differentiable = torch.is_grad_enabled()  # never so within a Function
    result: Tensor = _Experts.apply(x_RD, crossing, backend, weights, differentiable, *weights.stacked)  # type: ignore[no-untyped-call]
    return result


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
        own_X, their_X = crossing.own_X, [sum(count_Q) for count_Q in zip(*crossing.in_QX, strict=True)]
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
