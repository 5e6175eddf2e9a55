"""Base class of engines of decoders: a thread computes steps, and delivers updates of answers to coroutines."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from copy import deepcopy
from typing import Generic, TypeVar

from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.errors import MhmoeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.engine.background import BackgroundEngine, RequestTimes
from mhmoe_ray.serving.engine.request import (
    AnswerUpdate,
    BusyError,
    EngineError,
    Request,
    ServedWeights,
    Stats,
    Structures,
)
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import Location

Deliver = Callable[[AnswerUpdate | Exception], None]
"""Function that passes an update or an error from the engine's thread to the answer's coroutine."""
UpdateQueue = asyncio.Queue[AnswerUpdate | Exception]


class RequestState(RequestTimes):
    """The state of a request inside an engine, from its arrival to its end."""

    def __init__(self, request: Request, max_new_tokens: int, deliver: Deliver) -> None:
        super().__init__()
        self.request, self.max_new_tokens, self.deliver = request, max_new_tokens, deliver
        self.is_abandoned = False
        """Whether the generator of the answer is closed, so that nobody reads further updates."""
        self.is_running = False


T = TypeVar("T", bound=RequestState)
A = TypeVar("A")


class ThreadedEngine(BackgroundEngine, Generic[T, A]):
    """Base class of an `Engine` that computes in its own thread, with requests T and adapters A.

    Methods whose names begin with an underscore must be called with the lock `_condition` held, except the thread's
    body `_run` and `_run_round`. `_run` also calls `_deliver_updates` without the lock, because only the thread adds
    pending updates.
    """

    structures: Structures | None = None
    returns_routes = False

    def __init__(self, seq_len: int, stop_token_ids: frozenset[int], spec: ServeSpec) -> None:
        super().__init__()
        self.seq_len, self._stop_token_ids, self._spec = seq_len, stop_token_ids, spec
        self._pending_updates: dict[asyncio.AbstractEventLoop, list[tuple[UpdateQueue, AnswerUpdate | Exception]]] = {}
        """Updates by event loop, which gets those of a round together, because waking it is expensive."""
        self._adapters: dict[str, tuple[Location, ServedWeights, A]] = {}

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
        """Compute a step of the running requests or wait for work; return False once closed."""

    @abstractmethod
    def _fill_stats(self, stats: Stats) -> None:
        """Fill in the subclass's own statistics, such as the use of the KV cache."""

    @abstractmethod
    def _load_adapter(self, name: str, checkpoint: Location, weights: ServedWeights) -> A:
        """Load the adapter of a verified checkpoint without the lock; errors are those of `set_adapters`."""

    @property
    def adapters(self) -> Mapping[str, ServedWeights]:
        return {name: weights for name, (_, weights, _) in self._adapters.items()}

    def set_adapters(self, checkpoints: Mapping[str, Location]) -> None:
        adapters, errors = {}, []
        for name, checkpoint in checkpoints.items():
            if name in self._adapters and self._adapters[name][0] == checkpoint:
                adapters[name] = self._adapters[name]
                continue
            try:
                manifest = read_manifest(checkpoint, ("weights",))
                weights = ServedWeights(RunDir.of_checkpoint(checkpoint).id, manifest.step, manifest.weights_sha256)
                adapters[name] = (checkpoint, weights, self._load_adapter(name, checkpoint, weights))
            except MhmoeError as e:
                errors.append(e)
        with self._condition:
            self._adapters = adapters
        if errors:
            raise errors[0]

    def _adapter_of(self, request: Request) -> A | None:
        """Return the adapter of a new request. Must be called with the lock held."""
        if not request.adapter:
            return None
        if request.adapter not in self._adapters:
            raise EngineError(f"adapter {request.adapter} has just been removed")
        return self._adapters[request.adapter][-1]

    def _end_tokens(self, request: Request) -> frozenset[int]:
        """Return the tokens that end the answer to a request. Needs no lock."""
        return frozenset() if request.sampling_params.ignore_eos else self._stop_token_ids

    async def generate(self, request: Request) -> AsyncGenerator[AnswerUpdate, None]:
        """Hand a request to the engine's thread, and yield the updates of its answer."""
        loop, updates = asyncio.get_running_loop(), UpdateQueue()

        def deliver(update: AnswerUpdate | Exception) -> None:
            self._pending_updates.setdefault(loop, []).append((updates, update))

        max_new_tokens = min(request.sampling_params.max_tokens, self.seq_len - len(request.prompt_ids))
        with self._condition:
            self._require_open()
            # Running and waiting requests count together. The choices of one HTTP request arrive at the same time and
            # all wait until the next round, so even an idle engine would refuse some of them if only waiting requests
            # counted.
            if len(self._all_requests()) >= self._spec.max_concurrency + self._spec.max_waiting:
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
        with self._condition:
            stats = deepcopy(self._stats)
            stats.waiting = self._count_waiting()
            stats.running = len(self._all_requests()) - stats.waiting
            stats.answer_rate = self._answer_rate()
            self._fill_stats(stats)
            return stats

    def _run(self) -> None:
        """Run rounds until the engine is closed or fails, then fail all requests."""
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
        pending_updates, self._pending_updates = self._pending_updates, {}
        for loop, batch in pending_updates.items():
            # A loop may be closed while one of its requests is still in the engine, as when `asyncio.run` ends early.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_updates, batch)

    def _end_abandoned_requests(self) -> None:
        """End the requests whose generators are closed, so that nobody reads their answers."""
        for state in self._all_requests():
            if state.is_abandoned:
                self._end_request(state)

    def _record_start(self, state: T, queue_seconds: float, reused_tokens: int) -> None:
        """Record that the engine starts to compute a request, which waited for `queue_seconds`.

        The keys and values of `reused_tokens` of its prompt were in the KV cache already.
        """
        state.is_running = True
        self._stats.queue.add(queue_seconds)
        self._stats.prompt_tokens += len(state.request.prompt_ids)
        self._stats.reused_tokens += reused_tokens

    def _fail_request(self, state: T, error: EngineError) -> None:
        state.deliver(error)
        self._end_request(state)

    def _end_request(self, state: T) -> None:
        self._remove_request(state)
        self._stats.requests += 1


def _put_updates(batch: list[tuple[UpdateQueue, AnswerUpdate | Exception]]) -> None:
    """Put updates into their queues, in the queues' event loop, because they are not thread-safe."""
    for updates, update in batch:
        updates.put_nowait(update)
