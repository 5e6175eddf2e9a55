"""Who may ask, how much each client may have a minute, and how large a request may be."""

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


SCHEME = "bearer"
"""In small letters: clients may write it in any."""


@dataclass
class Client:
    name: str
    limits: Counter | None = None
    """None where it may have what it likes."""

    async def begin(self) -> None:
        """One request more.

        Raises:
            RequestError: it has had all of this minute's.
        """
        if self.limits and (spent := await self.limits.begin(self.name)):
            seconds = max(1, round(spent.seconds + 0.5))
            message = f"{self.name} has had all its {spent.what} of this minute; try again in {seconds} s"
            raise RequestError(429, message, code="rate_limit_exceeded", retry_after=seconds)

    def used(self, tokens: int) -> None:
        """Of prompts and answers."""
        if self.limits:
            self.limits.used(self.name, tokens)


class Access:
    def __init__(self, keys: Sequence[KeySpec], limits: Counter) -> None:
        """Args:
        keys: that are known; without any, everyone may ask.
        limits: of these.
        """
        self._clients = {key.sha256: Client(key.name, limits if any_limit([key]) else None) for key in keys}

    def client(self, http: Request) -> Client:
        """Who sent this.

        Raises:
            RequestError: it has no key, or none that is known, where there are keys.
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
    """A middleware that refuses larger ones, before they are in memory."""

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
