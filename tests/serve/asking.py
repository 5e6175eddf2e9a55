"""Synchronous requests to engines and applications, for tests that are no coroutines."""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI

from mhmoe_ray.serve.answer import Answerer, Piece
from mhmoe_ray.serve.engine import Engine, Request, Sampling, Scored


class Answer(NamedTuple):
    tokens: list[Scored]
    prompt: list[Scored]
    finish: str


def together(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Send all requests to the engine at once, and return their answers."""

    async def one(request: Request) -> Answer:
        updates = [update async for update in engine.generate(request)]
        tokens = [scored for update in updates for scored in update.tokens]
        assert [update.finish for update in updates[:-1]] == [None] * (len(updates) - 1)
        return Answer(tokens, [scored for update in updates for scored in update.prompt], updates[-1].finish)

    async def every() -> list[Answer]:
        return await asyncio.gather(*map(one, requests))

    return asyncio.run(every())


def tokens(engine: Engine, ids: Sequence[int], sampling: Sampling) -> list[int]:
    """Return the tokens of the answer to a single request."""
    [answer] = together(engine, [Request(tuple(ids), sampling)])
    return [scored.token for scored in answer.tokens]


def pieces(answerer: Answerer, ids: Sequence[int], sampling: Sampling, stops: Sequence[str] = ()) -> list[Piece]:
    async def every() -> list[Piece]:
        return [piece async for piece in answerer.answer(Request(tuple(ids), sampling), stops)]

    return asyncio.run(every())


def call(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    """Send one request to an application, without a server."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())
