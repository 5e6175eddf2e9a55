"""Rows to other ranks as a step of the autograd graph: their gradients travel the same way back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_ray.train.dispatch.exchange import Exchange


class End(NamedTuple):
    """Of the rows that travel, where they set out or where they arrive."""

    count_J: list[int]
    """Those that go to, or come from, each other rank."""
    rows: int
    """With those behind them, which do not travel and are 0 wherever they are written."""


def travel(exchange: Exchange, leaving: End, arriving: End, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the others have sent of their tensors, which may be of any dtype and width.

    Args:
        exchange: with the other ranks.
        leaving, arriving: the rows of every tensor before and after.
        tensors: two-dimensional. Of one row, what is in all of them travels in one piece.
    """
    return _travel(exchange, leaving, arriving, *tensors)


def _exchanged(exchange: Exchange, leaving: End, arriving: End, tensors: list[Tensor]) -> list[Tensor]:
    going, coming = sum(leaving.count_J), sum(arriving.count_J)
    rows = torch.cat([t[:going].contiguous().view(torch.uint8) for t in tensors], 1)
    into = rows.new_empty(coming, rows.shape[1])
    exchange.rows(rows, into, leaving.count_J, arriving.count_J).wait()
    arrived = [t.new_empty(arriving.rows, t.shape[1]) for t in tensors]
    for t, part in zip(arrived, torch.split(into, [t.shape[1] * t.itemsize for t in tensors], 1), strict=True):
        t[:coming].view(torch.uint8).copy_(part)
        t[coming:] = 0
    return arrived


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, leaving: End, arriving: End, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.way_back = exchange, arriving, leaving
        arrived = _exchanged(exchange, leaving, arriving, list(tensors))
        ctx.mark_non_differentiable(*(t for t in arrived if not t.is_floating_point()))
        return tuple(arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Of all that could have one, also where it is not needed: another rank may need its own.
        travelling = [gradient for gradient in gradients if gradient.is_floating_point()]
        exchange, leaving, arriving = ctx.way_back
        arrived = iter(_exchanged(exchange, leaving, arriving, travelling))
        return None, None, None, *(next(arrived) if g.is_floating_point() else None for g in gradients)


_travel: Callable[..., tuple[Tensor, ...]] = _Travel.apply
