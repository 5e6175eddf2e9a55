"""Uneven all-to-all between a rank and the others of its group, with the bytes it sends and the time it waits for
rows."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_event: Callable[..., torch.cuda.Event] = torch.cuda.Event


class Waited:
    """Timer of a rank's waits for rows of other ranks.

    A GPU waits by itself while the host runs ahead. So on a GPU two events on its stream measure a wait, and the host
    synchronizes with them only when it asks for the time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Measure the time that the context takes on a device.

        Args:
            device: device that waits in the context.
        """
        if device.type == "cuda":
            began, ended = (_event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def pop(self) -> float:
        """Return the seconds measured since the last call, and start from 0 again."""
        for began, ended in self._events:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


T = TypeVar("T")


class Sent(NamedTuple):
    """Bytes that left this rank."""

    rows: int = 0
    """Bytes of rows, outputs, and the gradients of both; gates and expert numbers are included where rows bring them
    along."""
    counts: int = 0
    """Bytes of the numbers that say how many rows go where."""
    between_nodes: int = 0
    """Bytes of `rows` that left the node."""

    def plus(self, other: "Sent") -> "Sent":
        return Sent(*(a + b for a, b in zip(self, other, strict=True)))


def least_sent(count_LE: Tensor, held: range, row_bytes: int) -> int:
    """Return the bytes of rows that must leave ranks for this rank's tokens where each route is a row of its own.

    This is so in flat dispatch: each kept route to an expert on another rank goes there and back, forward and backward,
    even where two routes go to the same rank.

    Args:
        count_LE: kept routes of this rank's tokens, per layer and expert.
        held: ids of the experts that this rank holds.
        row_bytes: bytes of one row as it travels.
    """
    elsewhere = count_LE.sum() - count_LE[:, held.start : held.stop].sum()
    return 4 * int(elsewhere) * row_bytes


class Flight(NamedTuple):
    """Exchange in progress."""

    work: Any
    """Handle of the asynchronous all-to-all; None if there are no other ranks."""
    rows: Tensor
    """Rows to send, held here until they have left, so that no other tensor takes their memory."""
    into: Tensor
    waited: Waited

    def wait(self) -> Tensor:
        if self.work:
            with self.waited.measured(self.into.device):
                self.work.wait()
        return self.into


class Exchange:
    """Everything that this rank sends to the other ranks of a group."""

    def __init__(self, group: dist.ProcessGroup, nodes: Sequence[object] | None = None) -> None:
        """Prepare exchanges within a process group.

        Args:
            group: process group of this rank.
            nodes: name of the node of each rank of the group, of any type; by default all ranks are on one node.
        """
        self._group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        nodes = nodes or [None] * self.ranks
        self._away = [node != nodes[self.rank] for node in self.others(nodes)]
        self._sent = Sent()
        self._waited = Waited()

    def others(self, of_ranks: Sequence[T]) -> list[T]:
        """Return the elements of the other ranks, without this rank's own.

        Args:
            of_ranks: one element for each rank of the group.
        """
        return [*of_ranks[: self.rank], *of_ranks[self.rank + 1 :]]

    def pop_sent(self) -> Sent:
        """Return the bytes sent since the last call, and start from 0 again."""
        sent, self._sent = self._sent, Sent()
        return sent

    def pop_waited(self) -> float:
        """Return the seconds that this rank waited for data of other ranks since the last call, and start from 0
        again."""
        return self._waited.pop()

    def counts(self, count_JX: Tensor) -> Flight:
        """Start to send count_JX[j] to the j-th other rank; what that rank sends arrives at the same index of the
        result."""
        self._sent = self._sent.plus(Sent(counts=count_JX.nbytes))
        each = [1] * len(self._away)
        return self._send(count_JX, torch.empty_like(count_JX), each, each)

    def rows(self, rows: Tensor, into: Tensor, out_J: list[int], in_J: list[int]) -> Flight:
        """Start to send the first out_J[0] of `rows` to the first other rank, and so on, while the others' rows arrive
        in `into`.

        Args:
            rows: rows to send, in the order of the other ranks.
            into: tensor for the received rows, in the order of the other ranks.
            out_J: number of rows for each other rank.
            in_J: number of rows from each other rank.
        """
        far = sum(count for count, away in zip(out_J, self._away, strict=True) if away)
        far_bytes = far * rows.shape[1] * rows.itemsize
        self._sent = self._sent.plus(Sent(rows=rows.nbytes, between_nodes=far_bytes))
        return self._send(rows, into, out_J, in_J)

    def _send(self, rows: Tensor, into: Tensor, out_J: list[int], in_J: list[int]) -> Flight:
        if self.ranks == 1:
            return Flight(None, rows, into, self._waited)
        at = self.rank
        arriving, leaving = ([*others[:at], 0, *others[at:]] for others in (in_J, out_J))
        work = dist.all_to_all_single(into, rows, arriving, leaving, group=self._group, async_op=True)
        return Flight(work, rows, into, self._waited)
