"""Base class of engines that compute in a thread of their own: their lock, statistics, failure and closing."""

import time
from abc import ABC, abstractmethod
from collections import deque
from threading import Condition, Thread

from mhmoe_ray.serving.engine.request import EngineError, Stats

# `Stats.answer_rate`, the number of answer tokens per second, is a mean over this time.
RATE_WINDOW_SECONDS = 10.0


class RequestTimes:
    """Times of a request by `time.monotonic`; it arrives when this object is created."""

    def __init__(self) -> None:
        # vLLM reports times by this clock too, so they can be compared with the arrival time.
        self.arrival_time = time.monotonic()
        self.last_token_time: float | None = None


class BackgroundEngine(ABC):
    """Base class of a `ServedEngine` that computes in its own thread, which a subclass starts."""

    def __init__(self) -> None:
        self._condition = Condition()
        """Lock of the engine's state, on which its thread waits for new requests and for the end."""
        self._stats = Stats()
        self._failure: Exception | None = None
        self._is_closed = False
        # The limit bounds memory while nobody reads statistics. It is far above the number of tokens in ten seconds.
        self._token_times = deque[float](maxlen=1_000_000)
        """Times of the newest tokens, by `time.monotonic`."""
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    @abstractmethod
    def _run(self) -> None:
        """Compute until the engine is closed or fails, then fail all requests. The engine's thread calls this."""

    @property
    def failure_reason(self) -> str | None:
        """Exception that broke the engine, as text; None while it works."""
        return f"{type(self._failure).__name__}: {self._failure}" if self._failure else None

    def close(self) -> None:
        """Stop the engine and wait for its thread to end."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join()

    def _require_open(self) -> None:
        """Raise EngineError if the engine is broken or closed. Must be called with the lock held."""
        if self._failure or self._is_closed:
            raise self._end_error()

    def _record_token(self, times: RequestTimes) -> None:
        """Record that the answer to a request has one more token. Must be called with the lock held."""
        current_time = time.monotonic()
        if times.last_token_time is None:
            self._stats.first_token.add(current_time - times.arrival_time)
        else:
            self._stats.each_token.add(current_time - times.last_token_time)
        times.last_token_time = current_time
        self._stats.answer_tokens += 1
        self._token_times.append(current_time)

    def _answer_rate(self) -> float:
        """Return the answer tokens per second over the last ten seconds. Must be called with the lock held."""
        window_start = time.monotonic() - RATE_WINDOW_SECONDS
        while self._token_times and self._token_times[0] < window_start:
            self._token_times.popleft()
        return len(self._token_times) / RATE_WINDOW_SECONDS

    def _end_error(self) -> EngineError:
        return EngineError(self.failure_reason or "it was closed")
