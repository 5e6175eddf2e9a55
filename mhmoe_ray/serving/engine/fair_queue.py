"""The queue of waiting requests, in which clients take turns."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Round-robin queue over clients; first come, first served within a client."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        """Queue of each client with waiting items; the client at the front has the next turn."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for queue in self._queues.values() for item in queue)

    def add(self, client: str, item: T) -> None:
        """Add an item behind the other items of its client."""
        self._queues.setdefault(client, deque()).append(item)

    def peek(self) -> T | None:
        """Return the next item without removing it; None if the queue is empty."""
        return next(iter(self._queues.values()))[0] if self._queues else None

    def pop(self) -> T:
        """Remove and return the next item of a queue that is not empty; its client then goes behind all others."""
        client, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[client] = queue
        return item

    def remove(self, client: str, item: T) -> None:
        """Remove an item, if it is in the queue."""
        queue = self._queues.get(client)
        if queue is None or item not in queue:
            return
        queue.remove(item)
        if not queue:
            del self._queues[client]
