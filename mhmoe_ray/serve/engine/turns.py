"""Those who wait take turns by client, each client's in order."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        """Of each client that has someone waiting; the first one's turn is next."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[T]:
        return (one for queue in self._queues.values() for one in queue)

    def add(self, client: str, one: T) -> None:
        self._queues.setdefault(client, deque()).append(one)

    def first(self) -> T | None:
        """The one whose turn it is."""
        return next(iter(self._queues.values()))[0] if self._queues else None

    def pop(self) -> T:
        """The one whose turn it is, which there must be; its client's next one is then behind everyone else's."""
        client, queue = self._queues.popitem(last=False)
        one = queue.popleft()
        if queue:
            self._queues[client] = queue
        return one

    def remove(self, client: str, one: T) -> None:
        """If it is there."""
        queue = self._queues.get(client)
        if queue is None or one not in queue:
            return
        queue.remove(one)
        if not queue:
            del self._queues[client]
