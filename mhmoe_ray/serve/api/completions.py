"""POST /v1/completions and, for models whose run has a chat template, POST /v1/chat/completions."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.answer import Piece, ScoredText
from mhmoe_ray.serve.api.access import Client
from mhmoe_ray.serve.api.errors import RequestError
from mhmoe_ray.serve.api.schema import (
    MOST_CHOICES,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    Choice,
    ChosenLogprob,
    Completion,
    CompletionRequest,
    Logprobs,
    Said,
    TokenLogprob,
    Usage,
)
from mhmoe_ray.serve.api.service import Service
from mhmoe_ray.serve.api.stream import DESCRIBED, EventResponse
from mhmoe_ray.serve.detokenizer import shown
from mhmoe_ray.serve.engine import Request


def completions_router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=Completion, responses={200: DESCRIBED})
    async def completions(
        request: CompletionRequest, client: Annotated[Client, Depends(service.access.client)]
    ) -> Response | Completion:
        service.check_model(request.model)
        service.check_max_tokens(request.max_tokens, "max_tokens")
        if len(request.prompt) * request.n > MOST_CHOICES:
            message = f"{len(request.prompt)} prompts times n {request.n} are more than {MOST_CHOICES} choices"
            raise RequestError(400, message, "n")
        prompts = [await service.prompt_ids(prompt, request.max_tokens > 0, "prompt") for prompt in request.prompt]
        ours = [int(isinstance(prompt, str)) for prompt in request.prompt]  # the token that starts a document
        asked = [
            (
                Request(
                    ids,
                    request.sampling(request.max_tokens, choice),
                    request.logprobs,
                    prompt_logprobs=request.echo and request.logprobs is not None,
                    client=client.name,
                ),
                own,
            )
            for (ids, own), choice in product(zip(prompts, ours, strict=True), range(request.n))
        ]
        answers = await service.answers(asked, request, request.echo, sum(map(len, prompts)), client)
        shape = _Shape(service.model, len(asked))
        if request.stream:
            last = (lambda: shape.body([], answers.usage)) if request.usage_wanted else None
            events = await answers.events(lambda number, piece: shape.body([shape.choice(number, piece)], None), last)
            return EventResponse(events)
        choices = [shape.choice(number, piece) for number, piece in enumerate(await answers.whole())]
        return shape.body(choices, answers.usage)

    return routes


class _Shape:
    """Builds the bodies of one response, which share an id."""

    def __init__(self, model: str, choices: int) -> None:
        self._model, self._id, self._created = model, f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._offsets = [_Offsets() for _ in range(choices)]

    def body(self, choices: list[Choice], usage: Usage | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def choice(self, number: int, piece: Piece) -> Choice:
        logprobs = self._offsets[number].logprobs(piece.scores) if piece.scores else None
        return Choice(text=piece.text, index=number, logprobs=logprobs, finish_reason=piece.finish_reason)


class _Offsets:
    """Offsets of the tokens in the text of one choice."""

    def __init__(self) -> None:
        self._at, self._bytes = 0, b""

    def logprobs(self, scores: Sequence[ScoredText]) -> Logprobs:
        return Logprobs(
            tokens=[shown(score.part) for score in scores],
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=[None if score.logprob is None else _tops(score) for score in scores],
            text_offset=[self._place(score) for score in scores],
        )

    def _place(self, score: ScoredText) -> int:
        try:
            score.part.decode()
        except UnicodeDecodeError:  # part of a character
            self._bytes += score.part
            return self._at
        self._at += len(self._bytes.decode("utf-8", "replace"))
        self._bytes = b""
        place, self._at = self._at, self._at + score.characters
        return place


def _tops(score: ScoredText) -> dict[str, float]:
    """Return the log-probabilities by text; of two tokens with the same text, the likelier one, which comes first,
    counts."""
    found: dict[str, float] = {}
    for part, logprob in score.alternatives:
        found.setdefault(shown(part), logprob)
    return found


def chat_router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: DESCRIBED})
    async def chat(
        request: ChatRequest, client: Annotated[Client, Depends(service.access.client)]
    ) -> Response | ChatCompletion:
        service.check_model(request.model)
        newer = request.max_completion_tokens
        max_tokens = newer or request.max_tokens or service.spec.max_tokens
        service.check_max_tokens(max_tokens, "max_completion_tokens" if newer else "max_tokens")
        ids = await _prompt_ids(service, request)
        logprobs = request.top_logprobs if request.logprobs else None
        asked = [
            (Request(ids, request.sampling(max_tokens, choice), logprobs, client=client.name), 0)
            for choice in range(request.n)
        ]
        answers = await service.answers(asked, request, False, len(ids), client)
        same: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model,
        }
        if request.stream:
            begun = set[int]()

            def chunk(number: int, piece: Piece) -> ChatChunk:
                role = None if number in begun else "assistant"
                begun.add(number)
                delta = ChatDelta(index=number, delta=Said(role=role, content=piece.text), **_more(piece))
                return ChatChunk(choices=[delta], **same)

            last = (lambda: ChatChunk(choices=[], usage=answers.usage, **same)) if request.usage_wanted else None
            return EventResponse(await answers.events(chunk, last))
        choices = [
            ChatChoice(index=number, message=Said(role="assistant", content=piece.text), **_more(piece))
            for number, piece in enumerate(await answers.whole())
        ]
        return ChatCompletion(choices=choices, usage=answers.usage, **same)

    return routes


async def _prompt_ids(service: Service, request: ChatRequest) -> tuple[int, ...]:
    template = service.answerer.template
    if template is None:
        message = "this model has no chat template, so it knows no conversations; ask /v1/completions"
        raise RequestError(400, message, "messages", "no_chat_template")
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    try:
        ids = await asyncio.to_thread(service.answerer.encode_chat, template, messages)
    except ServeError as e:
        raise RequestError(400, str(e), "messages") from e
    return await service.prompt_ids(ids, True, "messages")


def _more(piece: Piece) -> dict[str, Any]:
    logprobs = ChatLogprobs(content=[_chosen(score) for score in piece.scores]) if piece.scores else None
    return {"logprobs": logprobs, "finish_reason": piece.finish_reason}


def _chosen(score: ScoredText) -> ChosenLogprob:
    assert score.logprob is not None
    tops = [TokenLogprob(token=shown(part), logprob=lp, bytes=list(part)) for part, lp in score.alternatives]
    return ChosenLogprob(token=shown(score.part), logprob=score.logprob, bytes=list(score.part), top_logprobs=tops)
