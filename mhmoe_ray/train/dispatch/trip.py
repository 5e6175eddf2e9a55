"""Rows to other ranks as a step of the autograd graph, with time for other work while they travel."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_ray.train.dispatch.exchange import Exchange, Flight


class End(NamedTuple):
    """Of the rows of a trip, at one end of it."""

    count_Q: list[int]
    """Those that go to, or come from, each other rank."""
    rows: int
    """With those behind them, which do not travel and are 0 wherever they are written."""


class Kind(NamedTuple):
    """Of a tensor of rows."""

    width: int
    dtype: torch.dtype
    differentiable: bool


class Trip:
    """Tensors of rows to the other ranks, and their gradients the same way back; those of one row in one piece.

    What is done between `start` and `finish` goes on while they travel; in the backward pass that is the backward of
    the same work, since autograd first runs what was made last:

        forward    start   | work               | finish
        backward   finish: gradients set out    | of the work   | start: waits for them
    """

    def __init__(self, exchange: Exchange, leaving: End, arriving: End) -> None:
        self._exchange, self._leaving, self._arriving = exchange, leaving, arriving
        self._flight: Flight | None = None
        self.kinds: list[Kind] = []

    def start(self, *tensors: Tensor) -> Tensor:
        """Returns what `finish` needs, which ties the two together in the graph.

        Args:
            tensors: two-dimensional; gradients come back of those that need one.
        """
        token: Tensor = _Start.apply(self, *tensors)  # type: ignore[no-untyped-call]
        return token

    def finish(self, token: Tensor) -> tuple[Tensor, ...]:
        """What the other ranks have sent."""
        arrived: tuple[Tensor, ...] = _Finish.apply(self, token)  # type: ignore[no-untyped-call]
        return arrived

    def set_out(self, tensors: list[Tensor], back: bool = False) -> None:
        leaving, arriving = (self._arriving, self._leaving) if back else (self._leaving, self._arriving)
        going = sum(leaving.count_Q)
        rows = torch.cat([t[:going].contiguous().view(torch.uint8) for t in tensors], 1)
        into = rows.new_empty(sum(arriving.count_Q), rows.shape[1])
        self._flight = self._exchange.rows(rows, into, leaving.count_Q, arriving.count_Q)

    def arrive(self, kinds: list[Kind], back: bool = False) -> list[Tensor]:
        assert self._flight
        rows = self._flight.wait()
        self._flight = None
        at_end = (self._leaving if back else self._arriving).rows
        tensors = []
        parts = torch.split(rows, [kind.width * kind.dtype.itemsize for kind in kinds], 1)
        for kind, part in zip(kinds, parts, strict=True):
            whole = torch.empty(at_end, kind.width, dtype=kind.dtype, device=rows.device)
            whole[len(rows) :] = 0
            whole[: len(rows)].view(torch.uint8).copy_(part)
            tensors.append(whole)
        return tensors


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, *tensors: Tensor) -> Tensor:
        ctx.trip = trip
        needed = ctx.needs_input_grad[1:]
        trip.kinds = [Kind(t.shape[1], t.dtype, need) for t, need in zip(tensors, needed, strict=True)]
        trip.set_out(list(tensors))
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        kinds = ctx.trip.kinds
        arrived = iter(ctx.trip.arrive([kind for kind in kinds if kind.differentiable], back=True))
        return None, *(next(arrived) if kind.differentiable else None for kind in kinds)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, token: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        arrived = trip.arrive(trip.kinds)
        others = (t for t, kind in zip(arrived, trip.kinds, strict=True) if not kind.differentiable)
        ctx.mark_non_differentiable(*others)
        return tuple(arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        kinds = ctx.trip.kinds
        leaving = [gradient for gradient, kind in zip(gradients, kinds, strict=True) if kind.differentiable]
        ctx.trip.set_out(leaving, back=True)
        return None, leaving[0].new_empty(0)
