"""Access control: API keys, limits per client and minute, and the largest size of a request."""

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mhmoe_ray.serve.api.errors import RequestError, error_response
from mhmoe_ray.spec import KeySpec


class Bucket:
    """Token bucket: an amount per minute, spent at once or spread out. At most one minute's amount is saved up."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._rate, self._most, self._clock = per_minute / 60, per_minute, clock
        self._left, self._seen = per_minute, clock()

    def wait(self) -> float:
        """Return the seconds until at least one unit is available; 0 if it is available now."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._rate)
        self._seen = now
        return max(0.0, 1 - self._left) / self._rate

    def spend(self, amount: float) -> None:
        """Spend an amount, even if less is left: the bucket then stays empty until the excess is made up for."""
        self._left -= amount


class Spent(NamedTuple):
    """The limit that a client has used up for now."""

    what: str
    seconds: float
    """Seconds until something is available again."""


class Limits:
    """A `Counter` in this process: the limits of all clients, by name."""

    def __init__(self, keys: Sequence[KeySpec], clock: Callable[[], float] = time.monotonic) -> None:
        def bucket(per_minute: int | None) -> Bucket | None:
            return Bucket(per_minute, clock) if per_minute else None

        self._requests = {key.name: bucket(key.requests_per_minute) for key in keys}
        self._tokens = {key.name: bucket(key.tokens_per_minute) for key in keys}

    async def begin(self, client: str) -> Spent | None:
        """Count one more request of a client, unless a limit is used up; return that limit, or None."""
        requests = self._requests.get(client)
        for what, bucket in (("requests", requests), ("tokens", self._tokens.get(client))):
            if bucket and (wait := bucket.wait()):
                return Spent(what, wait)
        if requests:
            requests.spend(1)
        return None

    def used(self, client: str, tokens: int) -> None:
        """Count the tokens of a request's prompts and answers against the client's limit."""
        if bucket := self._tokens.get(client):
            bucket.spend(tokens)


class Counter(Protocol):
    """The interface of limits, wherever they are counted."""

    async def begin(self, client: str) -> Spent | None: ...

    def used(self, client: str, tokens: int) -> None: ...


def any_limit(keys: Sequence[KeySpec]) -> bool:
    return any(key.requests_per_minute or key.tokens_per_minute for key in keys)


SCHEME = "bearer"
"""Authorization scheme, in lower case for comparison: clients may write it in any case."""


@dataclass
class Client:
    name: str
    limits: Counter | None = None
    """Counter of the client's limits; None if the client has no limits."""

    async def begin(self) -> None:
        """Count one more request.

        Raises:
            RequestError: the client has used up its limit for this minute.
        """
        if self.limits and (spent := await self.limits.begin(self.name)):
            seconds = max(1, round(spent.seconds + 0.5))
            message = f"{self.name} has had all its {spent.what} of this minute; try again in {seconds} s"
            raise RequestError(429, message, code="rate_limit_exceeded", retry_after=seconds)

    def used(self, tokens: int) -> None:
        """Count the tokens of prompts and answers."""
        if self.limits:
            self.limits.used(self.name, tokens)


class Access:
    def __init__(self, keys: Sequence[KeySpec], limits: Counter) -> None:
        """Set up access for these keys.

        Args:
            keys: the known keys; without any, everyone has access.
            limits: counter of the keys' limits.
        """
        self._clients = {key.sha256: Client(key.name, limits if any_limit([key]) else None) for key in keys}

    def client(self, http: Request) -> Client:
        """Return the client that sent a request, by its API key.

        Raises:
            RequestError: keys are configured, and the request has no key or an unknown one.
        """
        if not self._clients:
            return Client("")
        given = http.headers.get("authorization", "")
        found = None
        scheme, _, key = given.partition(" ")
        if scheme.lower() == SCHEME:
            digest = hashlib.sha256(key.encode()).hexdigest()
            for known, client in self._clients.items():  # all of them, so that time does not tell which
                if hmac.compare_digest(known, digest):
                    found = client
        if found is None:
            message = "no such API key; send one as `Authorization: Bearer KEY`"
            raise RequestError(401, message, code="invalid_api_key")
        return found


class SmallBodies:
    """Middleware that refuses a body larger than `most` bytes before all of it is in memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        read, body = 0, list[Message]()
        too_large = declared.isdigit() and int(declared) > self._most
        while not too_large:
            message = await receive()
            body.append(message)
            read += len(message.get("body", b""))
            too_large = read > self._most
            if not message.get("more_body"):
                break
        if too_large:
            refused = RequestError(413, f"the body may have {self._most:,} bytes", code="request_too_large")
            await error_response(refused)(scope, receive, send)
            return

        async def again() -> Message:
            return body.pop(0) if body else await receive()

        await self._app(scope, again, send)
