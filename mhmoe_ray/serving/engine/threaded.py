"""Base class of engines of decoders: a thread computes steps, and delivers updates of answers to coroutines."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable
from copy import deepcopy
from typing import Generic, TypeVar

from mhmoe_ray.serving.engine.background import BackgroundEngine, RequestTimes
from mhmoe_ray.serving.engine.request import BusyError, EngineError, Request, Stats, Update

Deliver = Callable[[Update | Exception], None]
"""Function that passes an update or an error to the coroutine that reads a request's answer.

The engine's thread calls it.
"""
UpdateQueue = asyncio.Queue[Update | Exception]


class RequestState(RequestTimes):
    """The state of a request inside an engine, from its arrival to its end."""

    def __init__(self, request: Request, max_new_tokens: int, deliver: Deliver) -> None:
        """Create the state of a request that arrives now.

        Args:
            request: the prompt with its sampling parameters.
            max_new_tokens: largest number of tokens of the answer.
            deliver: function that is called with each update of the answer, or with an error.
        """
        super().__init__()
        self.request, self.max_new_tokens, self.deliver = request, max_new_tokens, deliver
        self.is_abandoned = False
        """Whether the generator of the answer is closed, so that nobody reads further updates."""
        self.is_running = False
        """Whether the engine has started to compute the request."""


T = TypeVar("T", bound=RequestState)


class ThreadedEngine(BackgroundEngine, Generic[T]):
    """Base class of an `Engine` that computes in its own thread.

    Methods of this class whose names begin with an underscore must be called with the lock `_condition` held. The
    exceptions are `_run` and `_run_round`, which are the body of the thread. `_run` also calls `_deliver_updates`
    without the lock, because only the thread adds pending updates.
    """

    def __init__(self, seq_len: int, max_concurrency: int, max_waiting: int) -> None:
        """Create the engine; a subclass starts its thread.

        Args:
            seq_len: largest number of tokens of prompt and answer together.
            max_concurrency: number of requests that are computed at a time.
            max_waiting: number of requests that may wait.
        """
        super().__init__()
        self._seq_len, self._max_concurrency, self._max_waiting = seq_len, max_concurrency, max_waiting
        self._pending_updates: dict[asyncio.AbstractEventLoop, list[tuple[UpdateQueue, Update | Exception]]] = {}
        """Updates to deliver, by event loop. A loop gets those of a round together, because waking it is expensive."""

    @abstractmethod
    def _add_request(self, request: Request, max_new_tokens: int, deliver: Deliver) -> T:
        """Add a new request to the waiting ones, and return its state."""

    @abstractmethod
    def _remove_request(self, state: T) -> None:
        """Remove a waiting or running request from the engine."""

    @abstractmethod
    def _all_requests(self) -> list[T]:
        """Return the states of all requests in the engine, running and waiting."""

    @abstractmethod
    def _count_waiting(self) -> int:
        """Return the number of waiting requests."""

    @abstractmethod
    def _run_round(self) -> bool:
        """Compute a round (a step of the running requests) or wait for work; return False once the engine is closed."""

    @abstractmethod
    def _fill_stats(self, stats: Stats) -> None:
        """Fill in the statistics that only the subclass measures, such as the use of the KV cache."""

    @property
    def seq_len(self) -> int:
        """Largest number of tokens of prompt and answer together."""
        return self._seq_len

    async def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        """Hand a request to the engine's thread, and yield the updates of its answer; see `Engine.generate`."""
        loop, updates = asyncio.get_running_loop(), UpdateQueue()

        def deliver(update: Update | Exception) -> None:
            self._pending_updates.setdefault(loop, []).append((updates, update))

        max_new_tokens = min(request.sampling_params.max_tokens, self._seq_len - len(request.prompt_ids))
        with self._condition:
            self._require_open()
            # Running and waiting requests count together. The choices of one HTTP request arrive at the same time and
            # all wait until the next round, so even an idle engine would refuse some of them if only waiting requests
            # counted.
            if len(self._all_requests()) >= self._max_concurrency + self._max_waiting:
                raise BusyError(f"{self._count_waiting()} requests wait already")
            state = self._add_request(request, max_new_tokens, deliver)
            self._condition.notify()
        try:
            while True:
                update = await updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update.finish_reason:
                    return
        finally:
            # A finished request has been removed from the engine already, so the mark only affects unfinished ones.
            with self._condition:
                state.is_abandoned = True

    def stats(self) -> Stats:
        """Return the statistics of the engine up to now; see `Engine.stats`."""
        with self._condition:
            stats = deepcopy(self._stats)
            stats.waiting = self._count_waiting()
            stats.running = len(self._all_requests()) - stats.waiting
            stats.answer_rate = self._answer_rate()
            self._fill_stats(stats)
            return stats

    def _run(self) -> None:
        """Run rounds until the engine is closed or fails, then fail all requests. The engine's thread calls this."""
        try:
            while self._run_round():
                self._deliver_updates()
        # Any exception of a round breaks the engine, and its waiting requests must end with an error.
        except Exception as e:
            self._failure = e
        with self._condition:
            for state in self._all_requests():
                self._fail_request(state, self._end_error())
        self._deliver_updates()

    def _wait_for_work(self) -> None:
        """Deliver pending updates, then wait until a request arrives or the engine is closed."""
        # Updates are delivered at the end of a round, and no round ends while the thread waits. So the error of a
        # request that failed earlier in this round is delivered here.
        self._deliver_updates()
        self._condition.wait()

    def _deliver_updates(self) -> None:
        """Pass all pending updates to the event loops of their requests."""
        pending_updates, self._pending_updates = self._pending_updates, {}
        for loop, batch in pending_updates.items():
            # A loop may be closed while one of its requests is still in the engine, as when `asyncio.run` ends early.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_updates, batch)

    def _end_abandoned_requests(self) -> None:
        """End the requests whose answers nobody reads any more, because their generators are closed."""
        for state in self._all_requests():
            if state.is_abandoned:
                self._end_request(state)

    def _record_start(self, state: T, queue_seconds: float, reused_tokens: int) -> None:
        """Record that the engine starts to compute a request.

        Args:
            state: the request.
            queue_seconds: seconds from its arrival until now.
            reused_tokens: number of its prompt tokens whose keys and values were in the KV cache already.
        """
        state.is_running = True
        self._stats.queue.add(queue_seconds)
        self._stats.prompt_tokens += len(state.request.prompt_ids)
        self._stats.reused_tokens += reused_tokens

    def _fail_request(self, state: T, error: EngineError) -> None:
        """Deliver an error to a request and end it."""
        state.deliver(error)
        self._end_request(state)

    def _end_request(self, state: T) -> None:
        """Remove a request from the engine, and count it among the requests that ended."""
        self._remove_request(state)
        self._stats.requests += 1


def _put_updates(batch: list[tuple[UpdateQueue, Update | Exception]]) -> None:
    """Put each update into its queue. This runs in the event loop of the queues, which are not thread-safe."""
    for updates, update in batch:
        updates.put_nowait(update)
