"""Base class of engines of encoders and vision models, whose requests have inputs with one answer each.

A thread computes rounds: a round is a forward pass over up to `max_concurrency` inputs of all requests, with the same
key, such as the task of a vision model. Clients, the requests of a client, the inputs of a request, and keys take
turns. An answer may take several rounds, such as one for each token of a caption.
"""

import asyncio
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from mhmoe_ray.serving.engine.background import BackgroundEngine, RequestTimes
from mhmoe_ray.serving.engine.fair_queue import FairQueue, TokenTurns
from mhmoe_ray.serving.engine.request import BusyError, EngineError, Stats
from mhmoe_ray.spec import ModelSpec, ServeSpec

Input = TypeVar("Input")
Output = TypeVar("Output")


class ClientRequest(RequestTimes, Generic[Input, Output]):
    """State of a client's request in an engine, from its arrival to its end."""

    def __init__(self, client: str) -> None:
        super().__init__()
        self.client = client
        self.input_tokens = 0
        """Number of tokens and patches of the inputs that were handed to the engine."""
        self.answer_tokens = 0
        self.is_started = False
        self.waiting_inputs = deque[InputState[Input, Output]]()
        """Waiting inputs; the request is in the engine's queue as long as there are any."""


@dataclass(eq=False)
class InputState(Generic[Input, Output]):
    """State of one input of a request in an engine, with the future that receives its answer."""

    value: Input
    request: ClientRequest[Input, Output]
    answer: asyncio.Future[Output]
    loop: asyncio.AbstractEventLoop
    is_started: bool = False
    token_count: int = 0
    """Number of tokens of the answer so far."""

    def deliver(self, answer: Output | EngineError) -> None:
        """Pass an answer or an error to the coroutine that waits for it. The engine's thread calls this."""

        def set_answer() -> None:
            # If the client has gone away, its future was cancelled and takes no answer.
            if self.answer.done():
                return
            if isinstance(answer, EngineError):
                self.answer.set_exception(answer)
            else:
                self.answer.set_result(answer)

        # A loop may be closed while one of its requests is still in the engine, as when `asyncio.run` ends early.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(set_answer)


class Continued(NamedTuple, Generic[Input]):
    """Result of a round for an input whose answer got one more token and is unfinished."""

    value: Input
    """The input for a later round, with the answer's tokens so far."""


class RoundEngine(BackgroundEngine, Generic[Input, Output]):
    """Base class of an engine that computes in rounds, in one process, on a CPU or one GPU."""

    def __init__(self, model: ModelSpec, device: torch.device, spec: ServeSpec) -> None:
        super().__init__()
        self._spec, self._device = spec, device
        self._queues: dict[Hashable, FairQueue[ClientRequest[Input, Output]]] = {}
        """Queues of requests with waiting inputs, by key; the first key with a request is computed next."""
        self._turns = TokenTurns()
        self._requests = set[ClientRequest[Input, Output]]()
        """All requests in the engine, also those whose images are being decoded."""
        self._running: list[InputState[Input, Output]] = []
        experts = model.moe.experts if model.moe else 0
        self._stats = Stats(count_LE=[[0] * experts for _ in range(model.moe_layers)])

    @abstractmethod
    def _compute(self, inputs: Sequence[Input]) -> Sequence[Output | Continued[Input]]:
        """Compute a round: return each input's answer, or `Continued` for an unfinished one."""

    @abstractmethod
    def _count_input_tokens(self, value: Input) -> int:
        """Return the number of tokens or patches of an input."""

    def _count_answer_tokens(self, answer: Output) -> int:
        """Return the number of tokens of an answer; 0 for answers that are not text."""
        return 0

    def _round_key(self, value: Input) -> Hashable:
        """Return the key of an input, such as its task, which all inputs of a request share."""
        return None

    @contextmanager
    def admission(self, client: str) -> Iterator[ClientRequest[Input, Output]]:
        """Return a context for one request of a client, in which images are decoded and inputs are computed.

        A full engine raises BusyError, and a broken or closed one EngineError.
        """
        request = ClientRequest[Input, Output](client)
        with self._condition:
            self._require_open()
            if len(self._requests) >= self._spec.max_concurrency + self._spec.max_waiting:
                raise BusyError(f"{len(self._requests)} requests are computed or wait already")
            self._requests.add(request)
        try:
            yield request
        finally:
            with self._condition:
                self._requests.remove(request)
                self._stats.requests += 1
                # Waiting inputs of a request that failed, or whose client has gone away, are not computed.
                if request.waiting_inputs:
                    self._queue_of(request).remove(request.client, request)
                    request.waiting_inputs.clear()

    async def answer(self, request: ClientRequest[Input, Output], inputs: Sequence[Input]) -> list[Output]:
        """Return the answers to all inputs of a request, at least one, inside its context from `admission`.

        A broken or closed engine raises EngineError.
        """
        loop = asyncio.get_running_loop()
        states = [InputState(value, request, loop.create_future(), loop) for value in inputs]
        with self._condition:
            self._require_open()
            request.input_tokens = sum(map(self._count_input_tokens, inputs))
            request.waiting_inputs.extend(states)
            self._queue_of(request).add(request.client, request)
            self._condition.notify()
        return list(await asyncio.gather(*(state.answer for state in states)))

    def stats(self) -> Stats:
        """Return the statistics up to now; a step in them is a round."""
        with self._condition:
            stats = deepcopy(self._stats)
            stats.running = len(self._requests.intersection(state.request for state in self._running))
            stats.waiting = len(self._requests) - stats.running
            stats.answer_rate = self._answer_rate()
            return stats

    def _run(self) -> None:
        """Compute rounds until the engine is closed or fails, then fail all requests."""
        # torch keeps this number for each calling thread, so it is set in the thread that computes.
        torch.set_num_threads(self._spec.cpus_per_replica)
        try:
            while states := self._next_states():
                with torch.inference_mode(), self._autocast():
                    results = self._compute([state.value for state in states])
                self._finish_round(states, results)
        # Any exception of a round breaks the engine, and its requests must learn that nobody computes them any more.
        except Exception as e:
            self._failure = e
        with self._condition:
            self._is_closed = True
            waiting_requests = [request for queue in self._queues.values() for request in queue]
            unfinished_states = [*self._running, *(state for r in waiting_requests for state in r.waiting_inputs)]
            self._running = []
        for state in unfinished_states:
            state.deliver(self._end_error())

    def _autocast(self) -> AbstractContextManager[object]:
        is_half = self._spec.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16) if is_half else nullcontext()

    def _queue_of(self, request: ClientRequest[Input, Output]) -> FairQueue[ClientRequest[Input, Output]]:
        """Return the queue of a request with waiting inputs. Must be called with the lock held."""
        return self._queues.setdefault(self._round_key(request.waiting_inputs[0].value), FairQueue(self._turns))

    def _next_states(self) -> list[InputState[Input, Output]]:
        """Wait for the inputs of the next round; return none once the engine is closed."""
        with self._condition:
            while not self._is_closed and not any(map(len, self._queues.values())):
                self._condition.wait()
            if self._is_closed:
                return []
            key = next(key for key, queue in self._queues.items() if len(queue))
            # Requests of different kinds (keys) wait in different queues. The chosen key moves behind all others, so
            # that keys take turns.
            self._queues[key] = queue = self._queues.pop(key)
            self._running = []
            while len(queue) and len(self._running) < self._spec.max_concurrency:
                request = queue.pop()
                state = request.waiting_inputs.popleft()
                # A later round of the same input adds one token to its answer.
                self._turns.charge(request.client, 1 if state.is_started else self._count_input_tokens(state.value))
                self._running.append(state)
                if request.waiting_inputs:
                    queue.add(request.client, request)
            for state in self._running:
                self._record_start(state)
            return self._running

    def _record_start(self, state: InputState[Input, Output]) -> None:
        """Record that an input enters its first round. Must be called with the lock held."""
        if not state.request.is_started:
            state.request.is_started = True
            self._stats.queue.add(time.monotonic() - state.request.arrival_time)
        if not state.is_started:
            state.is_started = True
            self._stats.prompt_tokens += self._count_input_tokens(state.value)

    def _finish_round(
        self, states: Sequence[InputState[Input, Output]], results: Sequence[Output | Continued[Input]]
    ) -> None:
        with self._condition:
            self._running = []
            for state, result in zip(states, results, strict=True):
                if isinstance(result, Continued):
                    self._record_new_tokens(state, state.token_count + 1)
                    self._continue_later(state, result)
                else:
                    self._record_new_tokens(state, self._count_answer_tokens(result))
                    if state.request.last_token_time is None:
                        state.request.last_token_time = time.monotonic()
                        self._stats.first_token.add(state.request.last_token_time - state.request.arrival_time)
        for state, result in zip(states, results, strict=True):
            if not isinstance(result, Continued):
                state.deliver(result)

    def _record_new_tokens(self, state: InputState[Input, Output], token_count: int) -> None:
        """Record that the answer to an input has `token_count` tokens now. Must be called with the lock held."""
        for _ in range(token_count - state.token_count):
            self._record_token(state.request)
        state.request.answer_tokens += token_count - state.token_count
        state.token_count = token_count

    def _continue_later(self, state: InputState[Input, Output], result: Continued[Input]) -> None:
        """Queue an unfinished input again, unless its client has gone away. Must be called with the lock held."""
        request = state.request
        if request not in self._requests:
            return
        state.value = result.value
        is_queued = bool(request.waiting_inputs)
        request.waiting_inputs.append(state)
        if not is_queued:
            self._queue_of(request).add(request.client, request)

    def _record_pass(self, count_LE: Sequence[Sequence[int]], tokens: int) -> None:
        """Add a forward pass to the statistics; its `tokens` are tokens and patches."""
        with self._condition:
            for layer, counts in enumerate(count_LE):
                self._stats.count_LE[layer] = [a + b for a, b in zip(self._stats.count_LE[layer], counts, strict=True)]
            self._stats.steps += 1
            self._stats.step_tokens += tokens
