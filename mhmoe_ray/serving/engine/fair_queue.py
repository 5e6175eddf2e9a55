"""Turns of clients by tokens: the client that got the fewest tokens of prompts and answers is next."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


BURST_TOKENS = 1024
"""Tokens that a client may get while others pause for it."""
REFILL_TOKENS = 16
"""Tokens of all clients for which each client may get one more token while others pause."""


class TokenTurns:
    """Number of tokens that each client got.

    A client that needs fewer tokens than others lets those that are far ahead pause, so that its answers stay fast. It
    may do so for bursts only: beside a client that always needs a few tokens, others would be as slow as that one.
    """

    def __init__(self, slack: int = 0) -> None:
        """Create turns in which a client may be `slack` tokens ahead of one that needs fewer tokens."""
        self._slack, self._most_tokens, self._all_tokens = slack, 0, 0
        self._tokens: dict[str, int] = {}
        self._bursts: dict[str, tuple[float, int]] = {}
        """Tokens that are left of each client's burst, and the tokens of all clients at that time."""

    def enter(self, client: str) -> None:
        """Let a client without requests come back, at most `slack` and a burst behind the client with most tokens."""
        # The other clients pause for this burst. Where none pauses, a client that comes back has no advantage.
        credit = self._slack + BURST_TOKENS if self._slack else 0
        self._tokens[client] = max(self._tokens.get(client, 0), self._most_tokens - credit)

    def next_client(self, clients: Iterable[str]) -> str:
        """Return the client that got the fewest tokens, the first of several."""
        return min(clients, key=self._tokens.__getitem__)

    def charge(self, client: str, tokens: int) -> None:
        self._tokens[client] += tokens
        self._all_tokens += tokens
        self._most_tokens = max(self._most_tokens, self._tokens[client])

    def share_step(self, clients: Iterable[str], take: Callable[[str], int], is_waiting: Callable[[str], bool]) -> None:
        """Divide a step among clients that have entered.

        `take` adds a client's next tokens to the step and returns their number, or 0 if it can add none. A client that
        can add no more, although it got fewer tokens than others up to now, stops those that are too far ahead: always
        if `is_waiting` says that it needs more than it can add, and else for a burst.
        """
        open_clients, start = list(clients), dict(self._tokens)
        limits: list[tuple[int, str]] = []
        """Numbers of tokens from which clients pause, each with the client for which they do."""
        while open_clients:
            client = self.next_client(open_clients)
            while limits and self._tokens[client] >= min(limits)[0]:
                limit, other_client = min(limits)
                got_tokens = self._tokens[other_client] - start[other_client]
                if is_waiting(other_client) or self._spend_burst(other_client, got_tokens):
                    return
                limits.remove((limit, other_client))
            if tokens := take(client):
                self.charge(client, tokens)
                continue
            open_clients.remove(client)
            if self._tokens[client] > start[client]:
                limits.append((self._tokens[client] + self._slack, client))

    def _spend_burst(self, client: str, tokens: int) -> bool:
        """Take tokens from a client's burst, which refills meanwhile; return False if it has too few."""
        burst_tokens, previous_tokens = self._bursts.get(client, (BURST_TOKENS, 0))
        burst_tokens = min(BURST_TOKENS, burst_tokens + (self._all_tokens - previous_tokens) / REFILL_TOKENS)
        self._bursts[client] = (max(0, burst_tokens - tokens), self._all_tokens)
        return burst_tokens >= tokens


class FairQueue(Generic[T]):
    """Queue in which clients take turns by tokens; first come, first served within a client."""

    def __init__(self, turns: TokenTurns | None = None) -> None:
        self.turns = turns or TokenTurns()
        self._queues: dict[str, deque[T]] = {}
        """Queue of each client with waiting items; of clients with equally many tokens, the first is next."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for queue in self._queues.values() for item in queue)

    @property
    def clients(self) -> list[str]:
        """Clients with waiting items."""
        return list(self._queues)

    def add(self, client: str, item: T) -> None:
        """Add an item behind the other items of its client."""
        if client not in self._queues:
            self.turns.enter(client)
        self._queues.setdefault(client, deque()).append(item)

    def peek(self, client: str) -> T | None:
        """Return the first item of a client without removing it; None if it has none."""
        return self._queues[client][0] if client in self._queues else None

    def pop(self, client: str | None = None) -> T:
        """Remove and return the first item of a client, by default of the next one; there must be an item."""
        client = self.turns.next_client(self._queues) if client is None else client
        queue = self._queues.pop(client)
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


def slots_of_client(max_running: int, clients: int) -> int:
    """Return the number of requests that a client may run although others already run `max_running`."""
    return max(1, max_running // clients)
