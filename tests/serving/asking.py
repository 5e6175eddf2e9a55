"""Synchronous requests to engines and applications, for tests that are not coroutines."""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI

from mhmoe_ray.serving.answer import Answerer, AnswerPiece
from mhmoe_ray.serving.engine import Engine, Request, SamplingParams, ScoredToken, TokenRoutes
from mhmoe_ray.serving.engine.round_engine import RoundEngine


class Answer(NamedTuple):
    """An engine's complete answer to a request, joined from its updates."""

    tokens: list[ScoredToken]
    prompt_scores: list[ScoredToken]
    finish_reason: str
    routes: list[TokenRoutes]


def answer_all(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Send all requests to the engine at the same time, and return their answers in the order of the requests."""

    async def answer_one(request: Request) -> Answer:
        updates = [update async for update in engine.generate(request)]
        tokens = [scored for update in updates for scored in update.tokens]
        assert [update.finish_reason for update in updates[:-1]] == [None] * (len(updates) - 1)
        prompt_scores = [scored for update in updates for scored in update.prompt_scores]
        routes = [route for update in updates for route in update.routes]
        return Answer(tokens, prompt_scores, updates[-1].finish_reason, routes)

    async def gather_answers() -> list[Answer]:
        return await asyncio.gather(*map(answer_one, requests))

    return asyncio.run(gather_answers())


def answer_tokens(engine: Engine, token_ids: Sequence[int], params: SamplingParams) -> list[int]:
    """Return the tokens of the answer to a single request."""
    [answer] = answer_all(engine, [Request(tuple(token_ids), params)])
    return [scored.token for scored in answer.tokens]


def answer_pieces(answerer: Answerer, token_ids: Sequence[int], params: SamplingParams) -> list[AnswerPiece]:
    """Return the pieces of text of the answer to a single request."""

    async def collect_pieces() -> list[AnswerPiece]:
        return [piece async for piece in answerer.answer(Request(tuple(token_ids), params))]

    return asyncio.run(collect_pieces())


async def answer_inputs(engine: RoundEngine, inputs: Sequence[Any], client: str = "") -> list[Any]:
    """Send one request of a client to an engine of encoders or vision models, and return its answers."""
    with engine.admission(client) as request:
        return await engine.answer(request, inputs)


def call(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    """Send one request to an application without a server, and return the response; exceptions become status 500."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())
