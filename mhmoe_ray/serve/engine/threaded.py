"""Base class of engines: a thread computes round after round and delivers updates to the coroutines that wait for
them."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable
from copy import deepcopy
from threading import Condition, Thread
from typing import Generic, TypeVar

from mhmoe_ray.serve.engine.request import BusyError, EngineError, Request, Stats, Update

RECENT = 10.0

Deliver = Callable[[Update | Exception], None]
"""Function that passes an update, or an error, to the request's coroutine. The engine's thread calls it."""
Updates = asyncio.Queue[Update | Exception]


class Ticket:
    """A request inside an engine."""

    def __init__(self, request: Request, room: int, deliver: Deliver) -> None:
        """Create the ticket of a request that arrives now.

        Args:
            request: the request.
            room: largest number of tokens of the answer.
            deliver: called with each update of the answer, or with an error.
        """
        self.request, self.room, self.deliver = request, room, deliver
        self.gone = False
        """Whether nobody wants the answer any more."""
        self.begun = False
        """Whether computation of the request has begun."""
        self.arrived = time.monotonic()
        self.spoke: float | None = None
        """Time of the answer's newest token, by `time.monotonic`; None before the first one."""


T = TypeVar("T", bound=Ticket)


class ThreadedEngine(ABC, Generic[T]):
    """An `Engine` that computes in a thread of its own.

    Methods whose names begin with an underscore must be called with the lock `_wake` held. Exceptions are the thread's
    own, `_run` and `_round`, and `_hand_over` as `_run` calls it: only that thread adds to the updates that it
    delivers.
    """

    def __init__(self, seq_len: int, concurrency: int, queue: int) -> None:
        """Create the engine; a subclass starts its thread.

        Args:
            seq_len: largest number of tokens of prompt and answer together.
            concurrency: number of requests that are computed at a time.
            queue: number of requests that may wait.
        """
        self._seq_len, self._concurrency, self._queue = seq_len, concurrency, queue
        self._wake = Condition()
        self._stats = Stats()
        self._recent = deque[float](maxlen=1_000_000)
        """Times of the newest tokens, by `time.monotonic`."""
        self._outgoing: dict[asyncio.AbstractEventLoop, list[tuple[Updates, Update | Exception]]] = {}
        """Updates of a round by event loop, delivered together because waking a loop costs more than a token."""
        self._broken: Exception | None = None
        self._closed = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    @abstractmethod
    def _enter(self, request: Request, room: int, deliver: Deliver) -> T:
        """Return a new ticket, which waits from now on."""

    @abstractmethod
    def _leave(self, ticket: T) -> None:
        """Remove the ticket, whether it waits or runs."""

    @abstractmethod
    def _everyone(self) -> list[T]:
        """Return the tickets of all requests in the engine, running and waiting."""

    @abstractmethod
    def _waiting(self) -> int:
        """Return the number of waiting requests."""

    @abstractmethod
    def _round(self) -> bool:
        """Compute once, or wait until there is something to do; return False once the engine is closed."""

    @abstractmethod
    def _measure(self, stats: Stats) -> None:
        """Fill in the statistics that a subclass measures."""

    @property
    def seq_len(self) -> int:
        return self._seq_len

    async def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        """Yield the updates of an answer; see `Engine.generate`."""
        loop, updates = asyncio.get_running_loop(), Updates()

        def deliver(update: Update | Exception) -> None:
            self._outgoing.setdefault(loop, []).append((updates, update))

        room = min(request.sampling.max_tokens, self._seq_len - len(request.prompt_ids))
        with self._wake:
            if self._broken or self._closed:
                raise EngineError(self.why_broken or "it was closed")
            # All that are in it count: those of one request come together, and wait until the next round even where
            # nothing is computed.
            if len(self._everyone()) >= self._concurrency + self._queue:
                raise BusyError(f"{self._waiting()} requests wait already")
            ticket = self._enter(request, room, deliver)
            self._wake.notify()
        try:
            while True:
                update = await updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update.finish:
                    return
        finally:
            with self._wake:
                ticket.gone = True  # where it ended, it is gone already

    def stats(self) -> Stats:
        """Return counts and the present state; see `Engine.stats`."""
        with self._wake:
            found = deepcopy(self._stats)
            found.waiting = self._waiting()
            found.running = len(self._everyone()) - found.waiting
            since = time.monotonic() - RECENT
            while self._recent and self._recent[0] < since:
                self._recent.popleft()
            found.answer_rate = len(self._recent) / RECENT
            self._measure(found)
            return found

    @property
    def why_broken(self) -> str | None:
        """The exception that broke the engine, as text; None while it works."""
        return f"{type(self._broken).__name__}: {self._broken}" if self._broken else None

    def close(self) -> None:
        """Stop the engine and wait for its thread to end; see `Engine.close`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        """Run rounds until the engine is closed or fails, then fail all requests: the main function of the thread."""
        error: Exception = EngineError("it was closed")
        try:
            while self._round():
                self._hand_over()
        except Exception as e:
            self._broken = error = e
        with self._wake:
            for ticket in self._everyone():
                self._fail(ticket, EngineError(self.why_broken or str(error)))
        self._hand_over()

    def _rest(self) -> None:
        """Deliver pending updates, then wait until the engine is notified of something new."""
        self._hand_over()
        self._wake.wait()

    def _hand_over(self) -> None:
        outgoing, self._outgoing = self._outgoing, {}
        for loop, batch in outgoing.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, batch)

    def _end_those_gone(self) -> None:
        for ticket in self._everyone():
            if ticket.gone:
                self._end(ticket)

    def _began(self, ticket: T, waited: float, reused: int) -> None:
        """Record that computation of a request begins.

        Args:
            ticket: the request's ticket.
            waited: seconds from its arrival until now.
            reused: number of its prompt tokens that were in the cache.
        """
        ticket.begun = True
        self._stats.queue.add(waited)
        self._stats.prompt_tokens += len(ticket.request.prompt_ids)
        self._stats.reused_tokens += reused

    def _spoke(self, ticket: T) -> None:
        """Record that the answer has one more token."""
        now = time.monotonic()
        if ticket.spoke is None:
            self._stats.first_token.add(now - ticket.arrived)
        else:
            self._stats.each_token.add(now - ticket.spoke)
        ticket.spoke = now
        self._stats.answer_tokens += 1
        self._recent.append(now)

    def _fail(self, ticket: T, error: EngineError) -> None:
        ticket.deliver(error)
        self._end(ticket)

    def _end(self, ticket: T) -> None:
        self._leave(ticket)
        self._stats.requests += 1


def _put(batch: list[tuple[Updates, Update | Exception]]) -> None:
    for updates, update in batch:
        updates.put_nowait(update)
