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


class Trip:
    """Tensors of rows to the other ranks, and their gradients the same way back.

    What is done between `start` and `finish` goes on while they travel; in the backward pass that is the backward of
    the same work, since autograd first runs what was made last:

        forward    start   | work               | finish
        backward   finish: gradients set out    | of the work   | start: waits for them
    """

    def __init__(self, exchange: Exchange, leaving: End, arriving: End) -> None:
        self._exchange, self._leaving, self._arriving = exchange, leaving, arriving
        self._flights: list[tuple[Flight, Tensor]] = []
        self.differentiable: tuple[bool, ...] = ()
        """Which of the tensors have gradients."""

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
        for rows in tensors:
            into, end = rows.new_empty(arriving.rows, rows.shape[1]), sum(arriving.count_Q)
            into[end:] = 0
            travelling = rows[: sum(leaving.count_Q)].contiguous()
            flight = self._exchange.rows(travelling, into[:end], leaving.count_Q, arriving.count_Q)
            self._flights.append((flight, into))

    def arrive(self) -> list[Tensor]:
        flights, self._flights = self._flights, []
        for flight, _ in flights:
            flight.wait()
        return [into for _, into in flights]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, *tensors: Tensor) -> Tensor:
        ctx.trip = trip
        trip.differentiable = ctx.needs_input_grad[1:]
        trip.set_out(list(tensors))
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        arrived = iter(ctx.trip.arrive())
        return None, *(next(arrived) if has else None for has in ctx.trip.differentiable)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, token: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        arrived = trip.arrive()
        ctx.mark_non_differentiable(*(t for t, has in zip(arrived, trip.differentiable, strict=True) if not has))
        return tuple(arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        leaving = [gradient for gradient, has in zip(gradients, ctx.trip.differentiable, strict=True) if has]
        ctx.trip.set_out(leaving, back=True)
        return None, leaving[0].new_empty(0)
