"""POST /v1/completions."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import product
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import StreamingResponse

from mhmoe_ray.serve import engine
from mhmoe_ray.serve.answer import Piece, ScoredText
from mhmoe_ray.serve.http.access import Client
from mhmoe_ray.serve.http.errors import RequestError, body_of
from mhmoe_ray.serve.http.schema import (
    MOST_CHOICES,
    Choice,
    Completion,
    CompletionRequest,
    ErrorBody,
    Logprobs,
    Usage,
)
from mhmoe_ray.serve.http.service import Service, merged

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS = {
    "description": "The answer; with `stream`, events with chunks of the same shape as `data`, and a last one of [DONE].",
    "content": {"text/event-stream": {"schema": _EVENT}},
}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=Completion, responses={200: EVENTS})
    async def completions(
        request: CompletionRequest, client: Annotated[Client, Depends(service.access.client)]
    ) -> Response | Completion:
        service.check_model(request.model)
        service.check_max_tokens(request.max_tokens)
        if len(request.prompt) * request.n > MOST_CHOICES:
            message = f"{len(request.prompt)} prompts times n {request.n} are more than {MOST_CHOICES} choices"
            raise RequestError(400, message, "n")
        prompts = [service.prompt_ids(prompt, request.max_tokens > 0) for prompt in request.prompt]
        client.check()
        asked = [
            engine.Request(
                ids,
                request.sampling(request.max_tokens, choice),
                request.logprobs,
                prompt_logprobs=request.echo and request.logprobs is not None,
                client=client.name,
            )
            for ids, choice in product(prompts, range(request.n))
        ]
        answers = [service.answerer.answer(one, request.stop, request.echo) for one in asked]
        pieces = merged(answers, service.spec.request_timeout)
        answer = _Answer(service.model, len(asked), sum(map(len, prompts)), client)
        if request.stream:
            return StreamingResponse(_events(answer, pieces, request.usage_wanted), media_type="text/event-stream")
        parts: list[list[Piece]] = [[] for _ in asked]
        async with aclosing(answer.counted(pieces)) as counted:
            async for number, piece in counted:
                parts[number].append(piece)
        return answer.whole(parts)

    return routes


class _Answer:
    """The bodies of one response, under one id."""

    def __init__(self, model: str, choices: int, prompt_tokens: int, client: Client) -> None:
        self._model, self._prompt_tokens, self._client = model, prompt_tokens, client
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._offsets = [_Offsets() for _ in range(choices)]
        self._tokens = [0] * choices

    async def counted(self, pieces: AsyncGenerator[tuple[int, Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
        """The same pieces, whose tokens the client has used however they end."""
        try:
            async with aclosing(pieces):
                async for number, piece in pieces:
                    self._tokens[number] = piece.tokens
                    yield number, piece
        finally:
            self._client.used(self._usage().total_tokens)

    def whole(self, parts: Sequence[Sequence[Piece]]) -> Completion:
        joined = [
            Piece(
                "".join(piece.text for piece in pieces),
                pieces[-1].tokens,
                tuple(score for piece in pieces for score in piece.scores),
                pieces[-1].finish_reason,
            )
            for pieces in parts
        ]
        choices = [self._choice(number, piece) for number, piece in enumerate(joined)]
        return self._body(choices, self._usage())

    def chunk(self, number: int, piece: Piece) -> Completion:
        return self._body([self._choice(number, piece)], None)

    def usage_chunk(self) -> Completion:
        return self._body([], self._usage())

    def _body(self, choices: list[Choice], usage: Usage | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, number: int, piece: Piece) -> Choice:
        logprobs = self._offsets[number].logprobs(piece.scores) if piece.scores else None
        return Choice(text=piece.text, index=number, logprobs=logprobs, finish_reason=piece.finish_reason)

    def _usage(self) -> Usage:
        answered = sum(self._tokens)
        total = self._prompt_tokens + answered
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=answered, total_tokens=total)


class _Offsets:
    """Where in the text of a choice its tokens begin."""

    def __init__(self) -> None:
        self._at, self._bytes = 0, b""

    def logprobs(self, scores: Sequence[ScoredText]) -> Logprobs:
        return Logprobs(
            tokens=[score.text for score in scores],
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=[score.alternatives if score.logprob is not None else None for score in scores],
            text_offset=[self._place(score.text) for score in scores],
        )

    def _place(self, text: str) -> int:
        if text.startswith("bytes:"):  # part of a character
            self._bytes += bytes.fromhex(text.removeprefix("bytes:"))
            return self._at
        self._at += len(self._bytes.decode("utf-8", "replace"))
        self._bytes = b""
        place, self._at = self._at, self._at + len(text)
        return place


async def _events(
    answer: _Answer, pieces: AsyncGenerator[tuple[int, Piece]], usage_wanted: bool
) -> AsyncGenerator[str]:
    """Server-sent events: chunks, then [DONE]; after a failure an error body in its place."""
    try:
        async with aclosing(answer.counted(pieces)) as counted:
            async for number, piece in counted:
                if piece.text or piece.scores or piece.finish_reason:
                    yield _event(answer.chunk(number, piece))
        if usage_wanted:
            yield _event(answer.usage_chunk())
    except Exception as e:
        yield _event(body_of(e))
    else:
        yield "data: [DONE]\n\n"


def _event(body: Completion | ErrorBody) -> str:
    return f"data: {body.model_dump_json()}\n\n"
