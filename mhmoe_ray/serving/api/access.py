"""Access control: API keys, a rate limit per client on requests and on tokens, and the largest size of a request."""

import asyncio
import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mhmoe_ray.serving.api.errors import RequestError, error_response
from mhmoe_ray.spec import KeySpec


class TokenBucket:
    """A token bucket: it refills at a rate per minute, and holds at most the amount of one minute."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._rate, self._capacity, self._clock = per_minute / 60, per_minute, clock
        self._available, self._refill_time = per_minute, clock()

    def wait_seconds(self) -> float:
        """Return the seconds until one unit is available; 0 if it is now."""
        current_time = self._clock()
        self._available = min(self._capacity, self._available + (current_time - self._refill_time) * self._rate)
        self._refill_time = current_time
        return max(0.0, 1 - self._available) / self._rate

    def spend(self, amount: float) -> None:
        """Spend an amount, even if less is available; the bucket then stays empty for longer."""
        # The amount may exceed what is available, because the tokens of an answer are known only at its end, when they
        # cannot be refused any more.
        self._available -= amount


class ExceededLimit(NamedTuple):
    """A rate limit, on "requests" or "tokens", that a client has used up for now."""

    unit: str
    retry_seconds: float


class LocalRateLimiter:
    """A `RateLimiter` that counts the requests and tokens of clients in this process."""

    def __init__(self, keys: Sequence[KeySpec], clock: Callable[[], float] = time.monotonic) -> None:
        """Create full token buckets for clients with a rate limit; keys with the same name share one."""

        def bucket(per_minute: int | None) -> TokenBucket | None:
            return TokenBucket(per_minute, clock) if per_minute else None

        self._requests = {key.name: bucket(key.requests_per_minute) for key in keys}
        self._tokens = {key.name: bucket(key.tokens_per_minute) for key in keys}

    async def begin_request(self, client: str) -> ExceededLimit | None:
        requests = self._requests.get(client)
        for unit, bucket in (("requests", requests), ("tokens", self._tokens.get(client))):
            if bucket and (seconds := bucket.wait_seconds()):
                return ExceededLimit(unit, seconds)
        if requests:
            requests.spend(1)
        return None

    def record_tokens(self, client: str, tokens: int) -> None:
        if bucket := self._tokens.get(client):
            bucket.spend(tokens)


class RateLimiter(Protocol):
    """Interface of rate limiters, which count in this process (`LocalRateLimiter`) or in one that replicas share."""

    async def begin_request(self, client: str) -> ExceededLimit | None:
        """Count one more request of a client. If a limit is used up, do not count it and return that limit."""
        ...

    def record_tokens(self, client: str, tokens: int) -> None:
        """Count the tokens of a request's prompts and answers against the client's limit."""
        ...


def has_limits(keys: Sequence[KeySpec]) -> bool:
    """Return whether any of these API keys has a rate limit."""
    return any(key.requests_per_minute or key.tokens_per_minute for key in keys)


AUTH_SCHEME = "bearer"
"""Authorization scheme, in lower case for comparison: clients may write it in any case."""


@dataclass
class Client:
    """A client of the server; its name is that of its API keys, or empty if the server has no keys."""

    name: str
    rate_limiter: RateLimiter | None = None

    async def begin_request(self) -> None:
        """Count one more request of this client; an exceeded rate limit is a RequestError."""
        if self.rate_limiter and (exceeded_limit := await self.rate_limiter.begin_request(self.name)):
            # The seconds are rounded upwards, because a client that retries too early is refused again.
            seconds = max(1, round(exceeded_limit.retry_seconds + 0.5))
            message = f"{self.name} has used all its {exceeded_limit.unit} of this minute; try again in {seconds} s"
            raise RequestError(429, message, code="rate_limit_exceeded", retry_after=seconds)

    def record_tokens(self, tokens: int) -> None:
        """Count tokens of prompts and answers against the client's rate limit, if it has one."""
        if self.rate_limiter:
            self.rate_limiter.record_tokens(self.name, tokens)


class AccessControl:
    """Access control of the server, which identifies clients by API key."""

    def __init__(self, keys: Sequence[KeySpec], rate_limiter: RateLimiter) -> None:
        self._clients = {key.sha256: Client(key.name, rate_limiter if has_limits([key]) else None) for key in keys}

    def find_client(self, headers: Headers) -> Client | None:
        """Return the client of the API key in the headers, if any; without keys, everyone is a nameless client."""
        if not self._clients:
            return Client("")
        authorization = headers.get("authorization", "")
        matching_client = None
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == AUTH_SCHEME:
            digest = hashlib.sha256(key.encode()).hexdigest()
            # All keys are compared, in constant time each, so that the time of a refusal does not reveal a key.
            for known_digest, client in self._clients.items():
                if hmac.compare_digest(known_digest, digest):
                    matching_client = client
        return matching_client

    def authenticate(self, http_request: Request) -> Client:
        """Return the client that sent a request; a missing or unknown key is a RequestError."""
        client = self.find_client(http_request.headers)
        if client is None:
            message = "no such API key; send one as `Authorization: Bearer KEY`"
            raise RequestError(401, message, code="invalid_api_key")
        return client


TEXT_BODY_BYTES = 1 << 20
"""Default limit of a request's body, in bytes, for models that read only text."""
IMAGE_BODY_BYTES = 16 << 20
"""Default limit of a request's body, in bytes, for models that read images."""


HELD_BODIES = 32
"""Number of bodies of the largest allowed size that a server holds in memory."""
MIN_HELD_BYTES = 256 << 20
"""Bytes of bodies that a server may hold even if `HELD_BODIES` largest bodies have fewer."""
BODY_SECONDS = 120.0
"""Seconds within which a whole body must arrive."""
SLOW_SECONDS = 1.0
"""Seconds after which a body that has not arrived is slow."""
SLOW_BODIES = 16
"""Number of slow bodies of one client at a time, each of which keeps a request slot of a replica."""
UNFINISHED_SHARE = 4
"""Divisor of the bytes that a server may hold, for one client's unfinished bodies."""


@dataclass
class _Body:
    """Body of a request, as far as it has arrived."""

    client_name: str
    messages: list[Message] = field(default_factory=list)
    size: int = 0


class BodyLimits:
    """Middleware that reads only bodies of clients with access, and refuses those that are too large, many or slow.

    A body of more than `max_bytes` bytes gets a 413, and one that takes longer than `BODY_SECONDS` a 408. A 429 keeps
    the bodies of unanswered requests below `max_held_bytes` bytes. A client with `SLOW_BODIES` other slow bodies, or
    more than its share of bytes in unfinished ones, gets a 429 too, so that slots and bytes are left for others.
    Without keys, a client is an IP address.
    """

    def __init__(self, app: ASGIApp, access: AccessControl, max_bytes: int, max_held_bytes: int) -> None:
        self._app, self._access, self._max_bytes, self._max_held_bytes = app, access, max_bytes, max_held_bytes
        self._held_bytes = 0
        self._unfinished_bytes, self._slow_bodies = Counter[str](), Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client = self._access.find_client(headers)
        body = _Body((client and client.name) or (scope.get("client") or ("",))[0])

        # The body has been received already, so the application gets the stored messages first.
        async def replay() -> Message:
            return body.messages.pop(0) if body.messages else await receive()

        try:
            if client is None:
                # The application refuses the request, or answers it without a body if its route needs no key.
                body.messages.append({"type": "http.request", "body": b"", "more_body": False})
                error = None
            else:
                error = await self._read(body, headers.get("content-length", ""), receive)
            if error is None:
                await self._app(scope, replay, send)
        finally:
            self._held_bytes -= body.size
        if error is not None:
            await error_response(error)(scope, receive, send)

    async def _read(self, body: _Body, declared_size: str, receive: Receive) -> RequestError | None:
        """Read a body and count its bytes as held; return an error for a refusal."""
        reason = f"the body did not arrive within {BODY_SECONDS:g} s; send it again"
        late_error, is_slow = RequestError(408, reason, code="timeout"), False

        def count_as_slow() -> None:
            nonlocal late_error, is_slow
            if self._slow_bodies[body.client_name] < SLOW_BODIES:
                self._slow_bodies[body.client_name] += 1
                is_slow = True
            else:
                late_error = _busy_error(f"{SLOW_BODIES} other bodies of this client are slow to arrive")
                deadline.reschedule(0)

        # A chunked body declares no size, and a declared size may be false, so the bytes are counted too.
        if declared_size.isdigit() and (error := self._error(body, int(declared_size))):
            return error
        timer = asyncio.get_running_loop().call_later(SLOW_SECONDS, count_as_slow)
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                while True:
                    message = await receive()
                    chunk_size = len(message.get("body", b""))
                    if error := self._error(body, chunk_size):
                        return error
                    body.messages.append(message)
                    body.size += chunk_size
                    self._held_bytes += chunk_size
                    self._unfinished_bytes[body.client_name] += chunk_size
                    if not message.get("more_body"):
                        return None
        except TimeoutError:
            return late_error
        finally:
            timer.cancel()
            _subtract(self._unfinished_bytes, body.client_name, body.size)
            _subtract(self._slow_bodies, body.client_name, int(is_slow))

    def _error(self, body: _Body, growth: int) -> RequestError | None:
        """Return the error of a body that grows by some bytes, if it has one."""
        if body.size + growth > self._max_bytes:
            reason = f"the body has more than {self._max_bytes:,} bytes"
            fix = "send a smaller one, or raise serve.max_body_bytes"
            return RequestError(413, f"{reason}; {fix}", code="request_too_large")
        if not growth:
            return None
        if self._held_bytes + growth > self._max_held_bytes:
            return _busy_error(f"the requests that it answers have {self._held_bytes:,} bytes")
        unfinished_bytes = self._unfinished_bytes[body.client_name]
        if unfinished_bytes > body.size and unfinished_bytes + growth > self._max_held_bytes // UNFINISHED_SHARE:
            return _busy_error(f"unfinished requests of this client have {unfinished_bytes:,} bytes")
        return None


def _busy_error(reason: str) -> RequestError:
    return RequestError(429, f"the server is busy: {reason}; try again in 1 s", code="busy", retry_after=1)


def _subtract(counter: Counter[str], client_name: str, count: int) -> None:
    """Subtract from a client's count, and forget a zero, because a server meets many addresses."""
    counter[client_name] -= count
    if not counter[client_name]:
        del counter[client_name]
