"""Base class of engines that compute in a thread of their own: their lock, their failure, and their end."""

from abc import ABC, abstractmethod
from threading import Condition, Thread

from mhmoe_ray.serving.engine.request import EngineError, Stats


class BackgroundEngine(ABC):
    """Base class of a `ServedEngine` that computes in its own thread."""

    def __init__(self) -> None:
        """Create the engine; a subclass starts its thread."""
        self._condition = Condition()
        """Lock of the engine's state, which is notified of new requests and of the end."""
        self._stats = Stats()
        self._failure: Exception | None = None
        self._is_closed = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    @abstractmethod
    def _run(self) -> None:
        """Compute until the engine is closed or fails, then fail all requests. The thread calls this."""

    @property
    def failure_reason(self) -> str | None:
        """Exception that broke the engine, as text; None while it works."""
        return f"{type(self._failure).__name__}: {self._failure}" if self._failure else None

    def close(self) -> None:
        """Stop the engine and wait for its thread to end; see `ServedEngine.close`."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join()

    def _require_open(self) -> None:
        """Raise EngineError if the engine is broken or closed. Must be called with the lock held."""
        if self._failure or self._is_closed:
            raise self._end_error()

    def _end_error(self) -> EngineError:
        """Return the error of a request that the engine does not answer any more."""
        return EngineError(self.failure_reason or "it was closed")
