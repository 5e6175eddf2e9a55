"""An uneven all-to-all between a rank and the others of its group: what it sends, and how long it waits for rows."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_event: Callable[..., torch.cuda.Event] = torch.cuda.Event


class Waited:
    """A GPU waits by itself while the host runs ahead: there two events on its stream tell how long, and the host waits
    for neither before it asks."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Args:
        device: that waits in it.
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
        """Seconds since this was last asked."""
        for began, ended in self._events:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


T = TypeVar("T")


class Sent(NamedTuple):
    """Bytes that left this rank."""

    rows: int = 0
    """Rows, outputs, and the gradients of both; where rows bring gates and the numbers of experts along, those too."""
    counts: int = 0
    """How many rows go where."""
    between_nodes: int = 0
    """Of `rows`, those that left the node."""

    def plus(self, other: "Sent") -> "Sent":
        return Sent(*(a + b for a, b in zip(self, other, strict=True)))


def least_sent(count_LE: Tensor, held: range, row_bytes: int) -> int:
    """Bytes of rows that must leave ranks for the sake of this rank's tokens where each route is a row of its own, as
    in flat dispatch: each kept route of an expert elsewhere goes there and back, forward and backward, even where two
    go to one rank.

    Args:
        count_LE: kept routes of this rank's tokens.
        held: the experts that it holds.
        row_bytes: of one row as it travels.
    """
    elsewhere = count_LE.sum() - count_LE[:, held.start : held.stop].sum()
    return 4 * int(elsewhere) * row_bytes


class Flight(NamedTuple):
    """An exchange under way."""

    work: Any
    """None where there are no others."""
    rows: Tensor
    """Held here until they have left: no other tensor may take their memory."""
    into: Tensor
    waited: Waited

    def wait(self) -> Tensor:
        if self.work:
            with self.waited.measured(self.into.device):
                self.work.wait()
        return self.into


class Exchange:
    """All that this rank sends to the others of a group."""

    def __init__(self, group: dist.ProcessGroup, nodes: Sequence[object] | None = None) -> None:
        """Args:
        group: of this rank.
        nodes: for each rank of the group, what names its node; by default all are on one.
        """
        self._group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        nodes = nodes or [None] * self.ranks
        self._away = [node != nodes[self.rank] for node in self.others(nodes)]
        self._sent = Sent()
        self._waited = Waited()

    def others(self, of_ranks: Sequence[T]) -> list[T]:
        """Without this rank's own."""
        return [*of_ranks[: self.rank], *of_ranks[self.rank + 1 :]]

    def pop_sent(self) -> Sent:
        """What was sent since this was last asked."""
        sent, self._sent = self._sent, Sent()
        return sent

    def pop_waited(self) -> float:
        """Seconds that this rank waited for what others send, since this was last asked."""
        return self._waited.pop()

    def counts(self, count_JX: Tensor) -> Flight:
        """Start to send count_JX[j] to the j-th other rank; what that sends arrives in the same place."""
        self._sent = self._sent.plus(Sent(counts=count_JX.nbytes))
        each = [1] * len(self._away)
        return self._send(count_JX, torch.empty_like(count_JX), each, each)

    def rows(self, rows: Tensor, into: Tensor, out_J: list[int], in_J: list[int]) -> Flight:
        """Start to send `rows`, the first out_J[0] to the first other rank, while theirs arrive in `into`."""
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
