"""Clients that send requests to a server with OpenAI's API, and time its answers."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import aiohttp

from mhmoe_ray.bench.serve.engines import MODEL_NAME, Prompt


class RequestOutcome(NamedTuple):
    """Outcome of one request; times are in seconds after it was sent. Without a stream, the first token has no time."""

    first_token_seconds: float | None
    total_seconds: float
    tokens: int


class Load(NamedTuple):
    """Outcomes of all requests of a round; `seconds` are those from the first request to the last answer."""

    seconds: float
    outcomes: list[RequestOutcome]

    @property
    def rate(self) -> float:
        """Tokens of answers per second."""
        return sum(a.tokens for a in self.outcomes) / self.seconds

    @property
    def first_token_seconds(self) -> float | None:
        """Median seconds until the first token; None without a stream."""
        seconds = [a.first_token_seconds for a in self.outcomes if a.first_token_seconds is not None]
        return median(seconds) if seconds else None


def closed_loop(url: str, requests: Sequence[Prompt], clients: int, stream: bool) -> Load:
    """Send requests from clients that share them; each waits for its answer before its next request."""

    async def run(session: aiohttp.ClientSession) -> list[RequestOutcome]:
        pending_requests = iter(requests)

        # All clients share one iterator, so each client takes the next request that no other client has taken.
        async def client() -> list[RequestOutcome]:
            return [await send_request(session, url, ids, tokens, stream) for ids, tokens in pending_requests]

        return [
            outcome for outcomes in await asyncio.gather(*(client() for _ in range(clients))) for outcome in outcomes
        ]

    return _measure_load(run, clients)


def open_loop(url: str, requests: Sequence[Prompt], rate: float, seed: int) -> Load:
    """Send streamed requests at random times (a Poisson process of `rate` per second), without waiting for answers."""
    generator = random.Random(seed)

    async def run(session: aiohttp.ClientSession) -> list[RequestOutcome]:
        tasks = []
        for number, (ids, tokens) in enumerate(requests):
            if number:
                await asyncio.sleep(generator.expovariate(rate))
            tasks.append(asyncio.create_task(send_request(session, url, ids, tokens, stream=True)))
        return list(await asyncio.gather(*tasks))

    # Requests do not wait for earlier ones, so the number of connections must have no limit. For aiohttp, 0 means no
    # limit.
    return _measure_load(run, 0)


async def send_request(
    session: aiohttp.ClientSession, url: str, ids: Sequence[int], tokens: int, stream: bool
) -> RequestOutcome:
    """Request one greedy completion of `tokens` tokens, and return its times and its number of tokens.

    A request that is refused, interrupted, or fails after the answer has started raises an aiohttp.ClientError.
    """
    body: dict[str, Any] = {"model": MODEL_NAME, "prompt": list(ids), "max_tokens": tokens, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    start_time, first_token_seconds, token_count = time.perf_counter(), None, 0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        if not stream:
            token_count = (await answer.json())["usage"]["completion_tokens"]
        else:
            async for line in answer.content:
                # The HTTP status is sent before the answer starts, so a later error can only arrive as an event.
                if line.startswith(b'data: {"error"'):
                    raise aiohttp.ClientError(line.decode().strip())
                if not line.startswith(b"data: {"):
                    continue
                if first_token_seconds is None:
                    first_token_seconds = time.perf_counter() - start_time
                if b'"usage":{' in line.replace(b" ", b""):
                    token_count = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
    return RequestOutcome(first_token_seconds, time.perf_counter() - start_time, token_count)


def _measure_load(run: Any, connections: int) -> Load:
    """Send requests with `run`, a coroutine function of an HTTP session; 0 connections are no limit."""

    async def run_session() -> Load:
        connector = aiohttp.TCPConnector(limit=connections)
        # There is no timeout, because an answer may take longer than aiohttp's default of five minutes.
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            start_time = time.perf_counter()
            outcomes = await run(session)
            return Load(time.perf_counter() - start_time, outcomes)

    return asyncio.run(run_session())
