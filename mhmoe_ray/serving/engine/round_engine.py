"""Base class of engines of encoders and vision models, whose requests have one answer instead of a stream of tokens.

A thread computes up to `max_concurrency` inputs of all requests in one round. A client's request may have several
inputs, and requests take turns. Inputs of one round have the same key, such as the task of a vision model.
"""

import asyncio
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from mhmoe_ray.model.router import Routing
from mhmoe_ray.serving.engine.background import BackgroundEngine
from mhmoe_ray.serving.engine.request import BusyError, Stats
from mhmoe_ray.spec import ModelSpec, ServeSpec

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass
class _State(Generic[Input, Output]):
    """Input in the engine, with the future of its answer."""

    request: Input
    answer: "asyncio.Future[Output]"
    loop: asyncio.AbstractEventLoop
    arrival_time: float = field(default_factory=time.monotonic)


class RoundEngine(BackgroundEngine, Generic[Input, Output]):
    """Base class of an engine that answers each input by one result, in one process, on a CPU or one GPU."""

    def __init__(self, model: ModelSpec, device: torch.device, spec: ServeSpec) -> None:
        """Create the engine; a subclass starts its thread.

        Args:
            model: spec of the model.
            device: device of the model.
            spec: precision, threads, and limits on numbers of requests.
        """
        super().__init__()
        self._spec, self._device = spec, device
        self._waiting = deque[deque[_State[Input, Output]]]()
        """Inputs that wait, of each request of a client; the requests take turns."""
        self._admitted = 0
        """Number of requests of clients that are decoded, computed or wait."""
        self._running: list[_State[Input, Output]] = []
        experts = model.moe.experts if model.moe else 0
        self._stats = Stats(count_LE=[[0] * experts for _ in range(model.moe_layers)])

    @abstractmethod
    def _compute(self, requests: Sequence[Input]) -> list[Output]:
        """Return the answers to the inputs of a round."""

    @abstractmethod
    def _count_tokens(self, request: Input, answer: Output) -> tuple[int, int]:
        """Return the numbers of tokens or patches of an input, and of tokens of its answer."""

    def _round_key(self, request: Input) -> Hashable:
        """Return the key of an input; those of one round are equal."""
        return None

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Return a context for one request of a client, in which its images are decoded and its inputs are computed.

        Raises:
            BusyError: too many requests of clients are in the engine already.
            EngineError: the engine is broken or closed.
        """
        with self._condition:
            self._require_open()
            if self._admitted >= self._spec.max_concurrency + self._spec.max_waiting:
                raise BusyError(f"{self._admitted} requests are computed or wait already")
            self._admitted += 1
        try:
            yield
        finally:
            with self._condition:
                self._admitted -= 1

    async def answer(self, requests: Sequence[Input]) -> list[Output]:
        """Return the answers to the inputs of one request of a client.

        Raises:
            EngineError: the engine is broken or closed.
        """
        loop = asyncio.get_running_loop()
        states = deque(_State[Input, Output](request, loop.create_future(), loop) for request in requests)
        answers = [state.answer for state in states]
        with self._condition:
            self._require_open()
            self._waiting.append(states)
            self._condition.notify()
        try:
            return list(await asyncio.gather(*answers))
        finally:
            # The rest of a request that failed or whose client has gone away is not computed.
            with self._condition:
                states.clear()

    def stats(self) -> Stats:
        """Return the statistics of the engine up to now. A step is a forward pass over all requests of a round."""
        with self._condition:
            stats = deepcopy(self._stats)
            stats.waiting, stats.running = sum(map(len, self._waiting)), len(self._running)
            return stats

    def _run(self) -> None:
        """Compute rounds until the engine is closed or fails, then fail all requests. The thread calls this."""
        # torch keeps this number for each calling thread, so it is set in the thread that computes.
        torch.set_num_threads(self._spec.cpus_per_replica)
        try:
            while states := self._next_states():
                with torch.inference_mode(), self._autocast():
                    outputs = self._compute([state.request for state in states])
                self._finish(states, outputs)
        # Any exception of a round breaks the engine, and its requests must learn that nobody computes them any more.
        except Exception as e:
            self._failure = e
        with self._condition:
            self._is_closed = True
            unfinished_states = [*self._running, *(state for states in self._waiting for state in states)]
            self._running, self._waiting = [], deque()
        for state in unfinished_states:
            _deliver(state, self._end_error())

    def _autocast(self) -> AbstractContextManager[object]:
        """Return a context in which products have the precision of the spec."""
        is_half = self._spec.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16) if is_half else nullcontext()

    def _next_states(self) -> list[_State[Input, Output]]:
        """Wait for requests and return the inputs of the next round; return none once the engine is closed."""
        with self._condition:
            while not any(self._waiting) and not self._is_closed:
                self._waiting.clear()
                self._condition.wait()
            if self._is_closed:
                return []
            self._running = []
            skipped_requests = deque[deque[_State[Input, Output]]]()
            while self._waiting and len(self._running) < self._spec.max_concurrency:
                states = self._waiting.popleft()
                if not states:
                    continue
                if self._running and self._key_of(states[0]) != self._key_of(self._running[0]):
                    skipped_requests.append(states)
                    continue
                self._running.append(states.popleft())
                self._waiting.append(states)
            # Those of another key come first in the next round, so that none of them waits forever.
            self._waiting.extendleft(reversed(skipped_requests))
            for state in self._running:
                self._stats.queue.add(time.monotonic() - state.arrival_time)
            return self._running

    def _key_of(self, state: _State[Input, Output]) -> Hashable:
        return self._round_key(state.request)

    def _finish(self, states: Sequence[_State[Input, Output]], outputs: Sequence[Output]) -> None:
        """Deliver the answers of a round and count them."""
        with self._condition:
            self._running = []
            self._stats.requests += len(states)
            for state, output in zip(states, outputs, strict=True):
                self._stats.first_token.add(time.monotonic() - state.arrival_time)
                prompt_tokens, answer_tokens = self._count_tokens(state.request, output)
                self._stats.prompt_tokens += prompt_tokens
                self._stats.answer_tokens += answer_tokens
        for state, output in zip(states, outputs, strict=True):
            _deliver(state, output)

    def _record_pass(self, routings: Sequence[Routing], tokens: int) -> None:
        """Count a forward pass.

        Args:
            routings: routing of each layer whose routes count.
            tokens: number of tokens and patches of the pass.
        """
        count_LE = [routing.count_E.tolist() for routing in routings]
        with self._condition:
            for layer, counts in enumerate(count_LE):
                self._stats.count_LE[layer] = [a + b for a, b in zip(self._stats.count_LE[layer], counts, strict=True)]
            self._stats.steps += 1
            self._stats.step_tokens += tokens


def _deliver(state: _State[Input, Output], answer: Output | Exception) -> None:
    """Pass an answer or an error to the coroutine of a request."""

    def set_answer() -> None:
        # A client that has gone away has cancelled its future.
        if state.answer.done():
            return
        if isinstance(answer, Exception):
            state.answer.set_exception(answer)
        else:
            state.answer.set_result(answer)

    # A loop may be closed while one of its requests is still in the engine, as when `asyncio.run` ends early.
    if not state.loop.is_closed():
        state.loop.call_soon_threadsafe(set_answer)
