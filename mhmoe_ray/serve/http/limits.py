"""How much each client may have a minute."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from mhmoe_ray.spec import KeySpec


class Bucket:
    """So much a minute, all of it at once or spread; what is not used is not saved up."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._rate, self._most, self._clock = per_minute / 60, per_minute, clock
        self._left, self._seen = per_minute, clock()

    def wait(self) -> float:
        """Seconds until there is one again; 0 if there is."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._rate)
        self._seen = now
        return max(0.0, 1 - self._left) / self._rate

    def spend(self, amount: float) -> None:
        """More than is left at most once: then nothing is, until that is made good."""
        self._left -= amount


class Spent(NamedTuple):
    """A client has had all of this minute's."""

    what: str
    seconds: float
    """Until there is some again."""


class Limits:
    """A `Counter` in this process. Of all clients, by name."""

    def __init__(self, keys: Sequence[KeySpec], clock: Callable[[], float] = time.monotonic) -> None:
        def bucket(per_minute: int | None) -> Bucket | None:
            return Bucket(per_minute, clock) if per_minute else None

        self._requests = {key.name: bucket(key.requests_per_minute) for key in keys}
        self._tokens = {key.name: bucket(key.tokens_per_minute) for key in keys}

    async def begin(self, client: str) -> Spent | None:
        """One request more of a client's, unless it has had its share."""
        requests = self._requests.get(client)
        for what, bucket in (("requests", requests), ("tokens", self._tokens.get(client))):
            if bucket and (wait := bucket.wait()):
                return Spent(what, wait)
        if requests:
            requests.spend(1)
        return None

    def used(self, client: str, tokens: int) -> None:
        """Of a request's prompts and answers."""
        if bucket := self._tokens.get(client):
            bucket.spend(tokens)


class Counter(Protocol):
    """Limits wherever they are kept."""

    async def begin(self, client: str) -> Spent | None: ...

    def used(self, client: str, tokens: int) -> None: ...


def any_limit(keys: Sequence[KeySpec]) -> bool:
    return any(key.requests_per_minute or key.tokens_per_minute for key in keys)
