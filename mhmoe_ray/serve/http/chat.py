"""POST /v1/chat/completions, for models whose run has a chat template."""

import asyncio
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.answer import Piece, ScoredText
from mhmoe_ray.serve.engine import Request
from mhmoe_ray.serve.http.access import Client
from mhmoe_ray.serve.http.errors import RequestError
from mhmoe_ray.serve.http.schema import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChosenLogprob,
    Said,
    TokenLogprob,
)
from mhmoe_ray.serve.http.service import Service
from mhmoe_ray.serve.http.stream import DESCRIBED, EventResponse
from mhmoe_ray.serve.text import shown


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
