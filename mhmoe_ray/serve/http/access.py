"""Who may ask, how much, and how large a request may be."""

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mhmoe_ray.serve.http.errors import RequestError, error_response
from mhmoe_ray.spec import KeySpec

SCHEME = "Bearer "


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


@dataclass
class Client:
    name: str
    requests: Bucket | None = None
    tokens: Bucket | None = None

    def check(self) -> None:
        """One request more.

        Raises:
            RequestError: it has had all of this minute's.
        """
        for what, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket and (wait := bucket.wait()):
                seconds = max(1, round(wait + 0.5))
                message = f"{self.name} has had all its {what} of this minute; try again in {seconds} s"
                raise RequestError(429, message, code="rate_limit_exceeded", retry_after=seconds)
        if self.requests:
            self.requests.spend(1)

    def used(self, tokens: int) -> None:
        """Of prompts and answers."""
        if self.tokens:
            self.tokens.spend(tokens)


@dataclass
class Access:
    """Of one replica: limits are shared out evenly over all of them."""

    keys: Sequence[KeySpec]
    replicas: int = 1
    clock: Callable[[], float] = time.monotonic
    _clients: dict[str, Client] = field(init=False)

    def __post_init__(self) -> None:
        def bucket(per_minute: int | None) -> Bucket | None:
            return Bucket(per_minute / self.replicas, self.clock) if per_minute else None

        self._clients = {
            key.sha256: Client(key.name, bucket(key.requests_per_minute), bucket(key.tokens_per_minute))
            for key in self.keys
        }

    def client(self, http: Request) -> Client:
        """Who sent this.

        Raises:
            RequestError: it has no key, or none that is known, where there are keys.
        """
        if not self._clients:
            return Client("")
        given = http.headers.get("authorization", "")
        found = None
        if given.startswith(SCHEME):
            digest = hashlib.sha256(given.removeprefix(SCHEME).encode()).hexdigest()
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
