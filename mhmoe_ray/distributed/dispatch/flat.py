"""Flat dispatch: for each choice of an expert (route), the row goes directly to the rank that holds this expert.

On CPUs, rows for a rank's own experts enter no exchange: they are computed, forward and backward, while other rows are
sent. A shared expert is computed while results travel back, because the own rows fill the time before.

    forward     counts out | permute, read counts | rows out      | own rows | received rows | outputs back   | shared
    backward                                        gradients out | the same | the same      | gradients back | shared

Kernels of Triton, on GPUs, take all rows of a rank in one pass, which halves the launches. The own rows take part in
the exchange, where they are a copy within the GPU. The gates travel with the rows, and their gradients back: the
expert's rank scales the outputs, so that no rank keeps outputs for the gradients of gates.

    forward     counts out | gather, read counts | rows, gates out | shared | all rows | outputs back
    backward                                       gradients out   | shared | all rows | gradients of rows, gates back

There the shared expert comes first. The host has just waited for the counts, so the GPU has no work queued: the shared
expert keeps it busy while rows travel and while the host launches the experts' kernels.

With `train.recompute: block`, the order of routes and the counts of the first forward serve the recomputed one too, in
which ranks exchange no counts and no host waits.

In this module R rows are sorted by expert, with dropped routes last. In the two passes, this rank's own experts come
first.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels import (
    TRITON_KERNELS,
    ExpertWeights,
    Function,
    RoutePlan,
    add_routes,
    combine,
    permute,
    plan_for_kernel,
    plan_received,
    run_experts,
    run_sorted_experts,
)
from mhmoe_ray.distributed.dispatch.exchange import PendingExchange, RowExchange
from mhmoe_ray.distributed.dispatch.inner_pass import (
    InnerPass,
    SharedPass,
    restore_saved,
    shared_arguments,
    take_all_saved,
)
from mhmoe_ray.model.feedforward import Experts, SharedExpert
from mhmoe_ray.model.recompute import recall
from mhmoe_ray.model.router import Routing

if TYPE_CHECKING:
    from mhmoe_kernels.triton.operators import SortedRoutes


class ExchangePlan:
    """Order of a rank's routes by destination, and the counts that ranks exchange for them."""

    def __init__(
        self, plan: "RoutePlan | SortedRoutes", exchange: RowExchange, count_PX: Tensor, sent_counts: Tensor
    ) -> None:
        """Start the exchange of `sent_counts`, rows of `count_PX`."""
        self.plan, self._count_PX = plan, count_PX
        self._pending = exchange.start_counts(sent_counts)

    @cached_property
    def received_counts(self) -> Tensor:
        """Counts that other ranks sent, on the device."""
        return self._pending.wait()

    @cached_property
    def host_counts(self) -> tuple[list[list[int]], list[list[int]]]:
        """`count_PX` and the received counts, on the host."""
        # This is the only place where the host waits for the device: the all-to-all needs its split sizes as numbers on
        # the host.
        numbers = torch.cat([self._count_PX, self.received_counts]).tolist()
        return numbers[: len(self._count_PX)], numbers[len(self._count_PX) :]


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
        exchange, n_local = self._exchange, len(weights.stacked[0])
        routed = recall(partial(self._start, expert_NK, gate_NK, kernel, n_local))
        plan = routed.plan if routes is None else routed.plan.trimmed(routes)
        x_RD = permute(x_ND, plan)
        if isinstance(plan, RoutePlan):
            (own_X, *out_JX), in_JX = routed.host_counts
            round_trip = _RoundTrip(exchange.start_rows, own_X, out_JX, in_JX)
            out_RD, y_BTM = _run_experts(_apply_two_passes, round_trip, (x_RD,), kernel, weights, shared)
            return combine(out_RD, gate_NK, plan), y_BTM
        gate_R1 = permute(gate_NK.reshape(-1, 1), plan.by_route())
        out_PX, in_PX = routed.host_counts
        one_pass = _OnePass(exchange.start_rows, _sums(out_PX), _sums(in_PX), routed.received_counts)
        out_RD, y_BTM = _run_experts(_apply_one_pass, one_pass, (x_RD, gate_R1), kernel, weights, shared)
        return add_routes(out_RD, plan), y_BTM

    def _start(self, expert_NK: Tensor, gate_NK: Tensor, kernel: str, n_local: int) -> ExchangePlan:
        """Sort routes by expert, with dropped routes last, and start the exchange of counts."""
        n_experts, start = n_local * self.ranks, self._exchange.rank * n_local
        in_one_pass = kernel in TRITON_KERNELS
        if not in_one_pass:
            # This rank's own experts are sorted first, so row 0 of the counts belongs to this rank.
            id_E = torch.arange(n_experts, device=expert_NK.device)
            expert_NK = torch.cat([id_E[n_local : n_local + start], id_E[:n_local], id_E[n_local + start :]])[expert_NK]
        plan = plan_for_kernel(kernel, expert_NK.masked_fill(gate_NK == 0, n_experts), n_experts)
        count_PX = plan.counts(n_experts).view(-1, n_local)
        return ExchangePlan(plan, self._exchange, count_PX, count_PX if in_one_pass else count_PX[1:])


def _sums(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(row) for row in counts]


StartRows = Callable[[Tensor, Tensor, list[int], list[int]], PendingExchange]


class _OnePass(NamedTuple):
    """Exchange of sorted rows, or of gradients, between all ranks, each with itself too."""

    start_exchange: StartRows
    out_P: list[int]  # this rank's rows for each rank
    in_P: list[int]  # rows from each rank
    received_PX: Tensor  # rows from each rank for each expert of this rank

    def send(self, x_RD: Tensor) -> PendingExchange:
        """Start to send rows to the ranks of their experts."""
        received = x_RD.new_empty(sum(self.in_P), x_RD.shape[1])
        return self.start_exchange(x_RD[: sum(self.out_P)], received, self.out_P, self.in_P)

    def send_back(self, tensors: Sequence[Tensor], length: int) -> list[Tensor]:
        """Return the results for `length` sorted rows, 0 for dropped routes."""
        end, pending = sum(self.out_P), []
        for t in tensors:
            result = t.new_empty(length, t.shape[1])
            if end < length:
                result[end:] = 0
            pending.append((result, self.start_exchange(t, result[:end], self.in_P, self.out_P)))
        for _, exchange in pending:
            exchange.wait()
        return [result for result, _ in pending]


class _RoundTrip(NamedTuple):
    """Round trip of sorted rows, or of gradients, to the experts of all ranks."""

    start_exchange: StartRows
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
        out_J, in_J = _sums(self.out_JX), _sums(self.in_JX)
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
    apply: Callable[..., tuple[Tensor, ...]],
    journey: _OnePass | _RoundTrip,
    tensors: Sequence[Tensor],
    kernel: str,
    weights: ExpertWeights,
    shared: SharedExpert | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output of each sorted row, 0 for dropped routes, and that of the shared expert, if any."""
    stacked, weights = weights.stacked, weights._replace(stacked=())
    shared_function, shared_tensors = shared_arguments(shared)
    # `torch.is_grad_enabled()` is called here, because gradients are always disabled inside an autograd function.
    settings = _Settings(kernel, weights, len(stacked), shared_function, torch.is_grad_enabled())
    y_RD, *shared_outputs = apply(journey, settings, *tensors, *stacked, *shared_tensors)
    return y_RD, shared_outputs[0] if shared_outputs else None


class _Settings(NamedTuple):
    """Arguments of an autograd function that are not tensors."""

    kernel: str
    weights: ExpertWeights  # function and options; autograd needs the tensors as arguments
    weight_count: int
    shared_function: Function | None
    differentiable: bool  # whether there will be a backward

    def run_sorted(self, counts: list[int], x: Tensor, *stacked: Tensor) -> Tensor:
        return run_sorted_experts(self.kernel, x, counts, self.weights._replace(stacked=stacked))

    def run_received(self, routes: "SortedRoutes", x: Tensor, gate_W1: Tensor, *stacked: Tensor) -> Tensor:
        return run_experts(self.kernel, x, routes, gate_W1, self.weights._replace(stacked=stacked))

    def shared_pass(self, tensors: Sequence[Tensor]) -> SharedPass:
        return SharedPass(self.shared_function, tensors[self.weight_count :], self.differentiable)


class _OnePassFunction(torch.autograd.Function):
    """Autograd function of `_run_experts` in one pass, from sorted rows and gates."""

    @staticmethod
    def forward(
        ctx: Any, one_pass: _OnePass, settings: _Settings, x_RD: Tensor, gate_R1: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        pending = one_pass.send(x_RD), one_pass.send(gate_R1)
        shared = settings.shared_pass(tensors)
        shared_outputs = shared.forward()
        x_WD, gate_W1 = (exchange.wait() for exchange in pending)
        # A pass computes the gradients of the tensors that require one.
        gate_W1.requires_grad_()
        run = partial(settings.run_received, plan_received(one_pass.received_PX, len(x_WD)))
        expert_pass = InnerPass(run, (gate_W1, *tensors[: settings.weight_count]), settings.differentiable)
        y_WD = expert_pass.forward(x_WD)
        # The outputs need memory of this size while they travel back.
        del pending, x_WD, gate_W1
        (y_RD,) = one_pass.send_back([y_WD], len(x_RD))
        ctx.one_pass, ctx.passes = one_pass, (expert_pass, shared)
        ctx.save_for_backward(*take_all_saved([expert_pass, *shared.passes]))
        return y_RD, *shared_outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor, *dy_shared: Tensor) -> tuple[Tensor | None, ...]:
        expert_pass, shared = ctx.passes
        # ctx lives as long as the loss. The saved rows are needed only in this call, so ctx must not keep them.
        del ctx.passes
        restore_saved([expert_pass, *shared.passes], list(ctx.saved_tensors))
        pending = ctx.one_pass.send(dy_RD)
        shared.backward(dy_shared)
        dx_WD = expert_pass.backward(pending.wait())
        dgate_W1, *dstacked = expert_pass.dweights
        assert dgate_W1 is not None
        gradients = ctx.one_pass.send_back([dx_WD, dgate_W1], len(dy_RD))
        return None, None, *gradients, *dstacked, *shared.gradients


# A single autograd function runs all steps from rows to outputs. With a function for each step, autograd would run
# their backwards in reverse order, and so wait for received rows before it works on the rank's own rows.
class _TwoPassesFunction(torch.autograd.Function):
    """Autograd function of `_run_experts` in two passes, first of own and then of received rows."""

    @staticmethod
    def forward(
        ctx: Any, round_trip: _RoundTrip, settings: _Settings, x_RD: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        stacked, own_X = tensors[: settings.weight_count], round_trip.own_X
        received_X = [sum(count_J) for count_J in zip(*round_trip.in_JX, strict=True)]
        # Without other ranks `received_X` is an empty list, but each expert needs a count.
        received_X = received_X or [0] * len(own_X)
        own_pass, received_pass = (
            InnerPass(partial(settings.run_sorted, counts), stacked, settings.differentiable)
            for counts in (own_X, received_X)
        )
        shared = settings.shared_pass(tensors)
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
        dweights = zip(own_pass.dweights, received_pass.dweights, strict=True)
        dstacked = (None if a is None or b is None else a.add_(b) for a, b in dweights)
        return None, None, dx_RD, *dstacked, *shared.gradients


_apply_one_pass: Callable[..., tuple[Tensor, ...]] = _OnePassFunction.apply
_apply_two_passes: Callable[..., tuple[Tensor, ...]] = _TwoPassesFunction.apply
