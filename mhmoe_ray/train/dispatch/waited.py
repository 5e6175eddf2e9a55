"""How long a rank waits for the rows of others."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

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
