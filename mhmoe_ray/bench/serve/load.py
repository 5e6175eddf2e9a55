"""Clients of a server with OpenAI's API."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import aiohttp

from mhmoe_ray.bench.serve.engines import NAME, Prompt


class Asked(NamedTuple):
    """Outcome of one request; times are in seconds from when it was sent."""

    first: float | None
    """Seconds until the first token; None if the answer is not streamed."""
    whole: float
    tokens: int


class Load(NamedTuple):
    seconds: float
    """Seconds from the first request to the last answer."""
    asked: list[Asked]

    @property
    def rate(self) -> float:
        """Tokens of answers per second."""
        return sum(a.tokens for a in self.asked) / self.seconds

    @property
    def first(self) -> float | None:
        """Median seconds until the first token; None if no answer is streamed."""
        found = [a.first for a in self.asked if a.first is not None]
        return median(found) if found else None


def closed_loop(url: str, requests: Sequence[Prompt], clients: int, stream: bool) -> Load:
    """Send requests from a number of clients, each of which waits for its answer before its next request."""

    async def run(session: aiohttp.ClientSession) -> list[Asked]:
        waiting = iter(requests)

        async def client() -> list[Asked]:
            return [await ask(session, url, ids, tokens, stream) for ids, tokens in waiting]

        return [one for asked in await asyncio.gather(*(client() for _ in range(clients))) for one in asked]

    return _timed(run, clients)


def open_loop(url: str, requests: Sequence[Prompt], rate: float, seed: int) -> Load:
    """Send requests at random times (a Poisson process), whether others are answered or not.

    Args:
        url: the URL of the server.
        requests: the requests.
        rate: the average number of requests per second.
        seed: the seed of the random times.
    """
    draws = random.Random(seed)

    async def run(session: aiohttp.ClientSession) -> list[Asked]:
        tasks = []
        for ids, tokens in requests:
            tasks.append(asyncio.create_task(ask(session, url, ids, tokens, stream=True)))
            await asyncio.sleep(draws.expovariate(rate))
        return list(await asyncio.gather(*tasks))

    return _timed(run, 0)


async def ask(session: aiohttp.ClientSession, url: str, ids: Sequence[int], tokens: int, stream: bool) -> Asked:
    """Request one greedy completion.

    Raises:
        aiohttp.ClientError: the request was refused, broke off or failed on the way.
    """
    body: dict[str, Any] = {"model": NAME, "prompt": list(ids), "max_tokens": tokens, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, used = time.perf_counter(), None, 0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        if not stream:
            used = (await answer.json())["usage"]["completion_tokens"]
        else:
            async for line in answer.content:
                if line.startswith(b'data: {"error"'):
                    raise aiohttp.ClientError(line.decode().strip())
                if not line.startswith(b"data: {"):
                    continue
                if first is None:
                    first = time.perf_counter() - began
                if b'"usage":{' in line.replace(b" ", b""):
                    used = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
    return Asked(first, time.perf_counter() - began, used)


def _timed(run: Any, connections: int) -> Load:
    async def whole() -> Load:
        connector = aiohttp.TCPConnector(limit=connections)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            began = time.perf_counter()
            asked = await run(session)
            return Load(time.perf_counter() - began, asked)

    return asyncio.run(whole())
