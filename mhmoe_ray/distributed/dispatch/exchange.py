"""The uneven all-to-all between the ranks of a group, with counts of the bytes sent and a timer of the waits.

An all-to-all of counts tells each rank how many rows it will receive. Each all-to-all is asynchronous, so that a rank
can meanwhile compute on its own rows, or compute a shared expert.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.model.parts import mark
from mhmoe_ray.planner.parts import EXCHANGE

_cuda_event: Callable[..., torch.cuda.Event] = torch.cuda.Event


GPU_WAITS_PER_SAMPLE = 17
"""One of this many waits of a GPU is measured, by two CUDA events. A prime measures each exchange of a layer in
turn."""


class WaitTimer:
    """Timer of a rank's waits for rows of other ranks; on a GPU it measures a sample of them."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._gpu_waits = 0  # since the last call of `pop_seconds`

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Add the time that `device` spends in the context to the timer."""
        # The host runs ahead while a GPU waits, so its clock does not see the wait. Events on the GPU's stream measure
        # the time instead.
        if device.type == "cuda":
            self._gpu_waits += 1
            if (self._gpu_waits - 1) % GPU_WAITS_PER_SAMPLE:
                yield
                return
            start_event, end_event = (_cuda_event(enable_timing=True) for _ in range(2))
            start_event.record()
            yield
            end_event.record()
            self._events.append((start_event, end_event))
        else:
            start_time = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start_time

    def pop_seconds(self) -> float:
        """Return the seconds of waits since the last call. On a GPU they are an estimate from the measured waits, for
        whose end this method blocks."""
        # The host waits for the GPU only here, and not in every exchange.
        sampled_seconds = 0.0
        for start_event, end_event in self._events:
            end_event.synchronize()
            sampled_seconds += start_event.elapsed_time(end_event) / 1000
        seconds = self._seconds
        if self._events:
            seconds += sampled_seconds * self._gpu_waits / len(self._events)
        self._seconds, self._events, self._gpu_waits = 0.0, [], 0
        return seconds


class Stopwatch:
    """Stopwatch of a device, which on a GPU measures its current stream, because the host runs ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._end = self._moment()

    def _moment(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = _cuda_event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._end = self._moment()

    def seconds(self) -> float:
        """Return the seconds from the start to the last stop; on a GPU this waits for it."""
        if self._device.type != "cuda":
            return float(self._end - self._start)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1000


T = TypeVar("T")


class SentBytes(NamedTuple):
    """Bytes that this rank sent to other ranks."""

    rows: int = 0  # rows, outputs, and gradients of both, including gates and expert numbers
    counts: int = 0  # counts that ranks exchange before their rows
    between_nodes: int = 0  # bytes of `rows` that were sent to other nodes

    def plus(self, other_bytes: "SentBytes") -> "SentBytes":
        return SentBytes(*(a + b for a, b in zip(self, other_bytes, strict=True)))


def flat_row_bytes(count_LE: Tensor, expert_ids: range, row_bytes: int, passes: int = 2) -> int:
    """Return the bytes that flat dispatch sends for this rank's tokens, there and back; recomputed blocks are a third
    pass."""
    remote_routes = count_LE.sum() - count_LE[:, expert_ids.start : expert_ids.stop].sum()
    # Each route to another rank is a row of its own, which is sent there and back.
    return passes * 2 * int(remote_routes) * row_bytes


class PendingExchange(NamedTuple):
    """Asynchronous all-to-all that has started."""

    work: Any  # None if there are no other ranks
    rows: Tensor  # being sent; the reference keeps torch from giving their memory to another tensor
    output: Tensor
    wait_timer: WaitTimer

    def wait(self) -> Tensor:
        """Wait for the all-to-all, measure the wait, and return the received rows."""
        if self.work:
            with mark(EXCHANGE), self.wait_timer.measure(self.output.device):
                self.work.wait()
        return self.output


class RowExchange:
    """All-to-all exchanges within a group, with counts of bytes and of waiting time."""

    def __init__(self, group: dist.ProcessGroup, nodes: Sequence[object] | None = None) -> None:
        """Prepare exchanges; `nodes` identifies each rank's node, by default one for all."""
        self._group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        nodes = nodes or [None] * self.ranks
        self._remote_flags = [node_name != nodes[self.rank] for node_name in self.exclude_own(nodes)]
        self._sent_bytes = SentBytes()
        self._wait_timer = WaitTimer()

    def exclude_own(self, values: Sequence[T]) -> list[T]:
        """Return the values of the other ranks."""
        return [*values[: self.rank], *values[self.rank + 1 :]]

    def pop_sent_bytes(self) -> SentBytes:
        """Return the bytes that this rank sent since the last call."""
        sent_bytes, self._sent_bytes = self._sent_bytes, SentBytes()
        return sent_bytes

    def pop_wait_seconds(self) -> float:
        """Return the seconds that this rank waited for other ranks since the last call."""
        return self._wait_timer.pop_seconds()

    def start_counts(self, count_JX: Tensor) -> PendingExchange:
        """Start an all-to-all of row counts: the j-th other rank receives count_JX[j], and its counts arrive at index
        j. With a row for each rank, this rank's own row arrives too."""
        sent_bytes = len(self._remote_flags) * count_JX[0].nbytes if len(count_JX) else 0
        self._sent_bytes = self._sent_bytes.plus(SentBytes(counts=sent_bytes))
        split_sizes = [1] * len(count_JX)
        return self._start_all_to_all(count_JX, torch.empty_like(count_JX), split_sizes, split_sizes)

    def start_rows(self, rows: Tensor, output: Tensor, out_J: list[int], in_J: list[int]) -> PendingExchange:
        """Start an all-to-all of rows: the j-th other rank receives the next out_J[j] of `rows`, and sends in_J[j] for
        `output`. With counts for each rank, `rows` and `output` have this rank's own rows too."""
        count_J = self.exclude_own(out_J) if len(out_J) == self.ranks else out_J
        remote_count = sum(count for count, is_remote in zip(count_J, self._remote_flags, strict=True) if is_remote)
        row_bytes = rows.shape[1] * rows.itemsize
        sent_bytes = SentBytes(rows=sum(count_J) * row_bytes, between_nodes=remote_count * row_bytes)
        self._sent_bytes = self._sent_bytes.plus(sent_bytes)
        return self._start_all_to_all(rows, output, out_J, in_J)

    def _start_all_to_all(self, rows: Tensor, output: Tensor, out_J: list[int], in_J: list[int]) -> PendingExchange:
        """Start an all-to-all like `start_rows`, without counting bytes."""
        if self.ranks == 1:
            return PendingExchange(None, rows, output.copy_(rows), self._wait_timer)
        output_splits, input_splits, rank = in_J, out_J, self.rank
        if len(in_J) < self.ranks:
            # This rank's own rows are not among `rows`, so its place in both lists of counts is 0.
            output_splits, input_splits = ([*counts[:rank], 0, *counts[rank:]] for counts in (in_J, out_J))
        work = dist.all_to_all_single(output, rows, output_splits, input_splits, group=self._group, async_op=True)
        return PendingExchange(work, rows, output, self._wait_timer)
