"""The routes POST /v1/completions and, for models whose run has a chat template, POST /v1/chat/completions."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.answer import AnswerPiece, ScoredText, join_pieces
from mhmoe_ray.serving.api.access import Client
from mhmoe_ray.serving.api.errors import RequestError
from mhmoe_ray.serving.api.schema import (
    MAX_CHOICES,
    CallDelta,
    CallMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponseMessage,
    Choice,
    ChosenLogprob,
    Completion,
    CompletionRequest,
    Logprobs,
    Routes,
    Usage,
)
from mhmoe_ray.serving.api.service import CompletionService
from mhmoe_ray.serving.api.stream import RESPONSE_DESCRIPTION, EventResponse
from mhmoe_ray.serving.api.structured import AnswerPlan, StructuredChatRequest, plan_answer, template_messages
from mhmoe_ray.serving.detokenizer import format_token
from mhmoe_ray.serving.engine import Request


def completions_router(service: CompletionService) -> APIRouter:
    """Return a router with the route POST /v1/completions."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=Completion, responses={200: RESPONSE_DESCRIPTION})
    async def completions(
        request: CompletionRequest, response: Response, client: Annotated[Client, Depends(service.access.authenticate)]
    ) -> Response | Completion:
        model = service.check_model(request.model)
        max_tokens = service.completion_max_tokens(request.max_tokens)
        if len(request.prompt) * request.n > MAX_CHOICES:
            message = f"{len(request.prompt)} prompts times n {request.n} are more than {MAX_CHOICES} choices"
            raise RequestError(400, message, "n")
        prompts = [await service.prompt_ids(prompt, max_tokens > 0, "prompt") for prompt in request.prompt]
        # The server may put the token that starts a document in front of a text, and nothing in front of token ids.
        added_tokens = [
            service.answerer.count_added(ids) if isinstance(prompt, str) else 0
            for prompt, ids in zip(request.prompt, prompts, strict=True)
        ]
        sampling = request.sampling_params(max_tokens, request.logprobs)
        scores_prompt = request.echo and request.logprobs is not None
        engine_requests = [
            (
                Request(
                    ids,
                    sampling.for_answer(choice),
                    scores_prompt,
                    client.name,
                    service.adapter(model),
                    return_routes=request.return_routes,
                ),
                added_count,
            )
            for (ids, added_count), choice in product(zip(prompts, added_tokens, strict=True), range(request.n))
        ]
        answers = await service.start_answers(engine_requests, request.echo, sum(map(len, prompts)), client)
        builder = _ResponseBuilder(model, len(engine_requests))
        if request.stream:
            include_usage = request.stream_options.include_usage
            build_usage_chunk = (lambda: builder.build_body([], answers.usage)) if include_usage else None
            events = await answers.events(
                lambda number, piece: builder.build_body([builder.build_choice(number, piece)], None), build_usage_chunk
            )
            return EventResponse(events, answers.headers)
        response.headers.update(answers.headers)
        choices = [builder.build_choice(number, piece) for number, piece in enumerate(await answers.collect_pieces())]
        return builder.build_body(choices, answers.usage)

    return routes


class _ResponseBuilder:
    """Builder of the body of one response, or of the bodies of all chunks of a stream, which share an id."""

    def __init__(self, model: str, choices: int) -> None:
        self._model, self._id, self._created = model, f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._offsets = [_TextOffsets() for _ in range(choices)]

    def build_body(self, choices: list[Choice], usage: Usage | None) -> Completion:
        """Return the body of a complete response, or of one chunk of a stream."""
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def build_choice(self, number: int, piece: AnswerPiece) -> Choice:
        """Return the choice with index `number`, with the next piece of its text or with all of it."""
        logprobs = self._offsets[number].logprobs(piece.scores) if piece.scores else None
        routes = Routes.from_tokens(piece.routes)
        return Choice(
            text=piece.text, index=number, logprobs=logprobs, finish_reason=piece.finish_reason, routes=routes
        )


class _TextOffsets:
    """Counter of characters that gives each token of one choice its offset in the text."""

    def __init__(self) -> None:
        self._offset, self._partial_bytes = 0, b""

    def logprobs(self, scores: Sequence[ScoredText]) -> Logprobs:
        """Return the scores and offsets of the choice's next tokens in the format of OpenAI's API."""
        return Logprobs(
            tokens=[format_token(score.token_bytes) for score in scores],
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=[None if score.logprob is None else _top_logprobs(score) for score in scores],
            text_offset=[self._token_offset(score) for score in scores],
        )

    def _token_offset(self, score: ScoredText) -> int:
        """Return the offset of the next token in the text, and advance by its characters."""
        try:
            score.token_bytes.decode()
        # A token that is only a part of a character gets the offset of that character. The offset advances once the
        # character is complete.
        except UnicodeDecodeError:
            self._partial_bytes += score.token_bytes
            return self._offset
        self._offset += len(self._partial_bytes.decode("utf-8", "replace"))
        self._partial_bytes = b""
        token_offset, self._offset = self._offset, self._offset + score.character_count
        return token_offset


def _top_logprobs(score: ScoredText) -> dict[str, float]:
    """Return the log-probabilities of a token's alternatives, by the text of each alternative."""
    # Two tokens may have the same text; the likelier one comes first, and its log-probability is kept.
    logprob_by_text: dict[str, float] = {}
    for token_bytes, logprob in score.alternatives:
        logprob_by_text.setdefault(format_token(token_bytes), logprob)
    return logprob_by_text


def chat_router(service: CompletionService) -> APIRouter:
    """Return a router with the route POST /v1/chat/completions."""
    routes, structures = APIRouter(), service.answerer.engine.structures
    route = routes.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: RESPONSE_DESCRIPTION})
    ClientOfKey = Annotated[Client, Depends(service.access.authenticate)]
    if structures is None:

        @route
        async def chat(request: ChatRequest, response: Response, client: ClientOfKey) -> Response | ChatCompletion:
            return await _answer_chat(service, request, response, client, AnswerPlan())
    else:

        @route
        async def chat_with_tools(
            request: StructuredChatRequest, response: Response, client: ClientOfKey
        ) -> Response | ChatCompletion:
            return await _answer_chat(service, request, response, client, await plan_answer(request, structures))

    return routes


async def _answer_chat(
    service: CompletionService, request: ChatRequest, response: Response, client: Client, plan: AnswerPlan
) -> Response | ChatCompletion:
    model = service.check_model(request.model)
    max_tokens = service.chat_max_tokens(request.max_completion_tokens, request.max_tokens)
    ids = await _encode_messages(service, request, plan.tools)
    sampling = request.sampling_params(max_tokens, request.top_logprobs if request.logprobs else None)
    engine_requests = [
        (
            Request(
                ids,
                sampling.for_answer(choice),
                client=client.name,
                adapter=service.adapter(model),
                structure=plan.structure,
                return_routes=request.return_routes,
            ),
            0,
        )
        for choice in range(request.n)
    ]
    answers = await service.start_answers(engine_requests, False, len(ids), client)
    common_fields: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
    }
    if request.stream:
        started_choices = set[int]()
        unread_pieces: dict[int, list[AnswerPiece]] = {}

        def build_chunk(number: int, piece: AnswerPiece) -> ChatChunk | None:
            if plan.read:
                # Calls can be told from text at the end of an answer, so such an answer is one chunk.
                unread_pieces.setdefault(number, []).append(piece)
                if not piece.finish_reason:
                    return None
                piece = join_pieces(unread_pieces[number])
            # As in OpenAI's API, only the first chunk of a choice has the role.
            role: Literal["assistant"] | None = None if number in started_choices else "assistant"
            started_choices.add(number)
            message, fields = _read_message(plan, piece, role)
            delta = CallDelta.from_message(message) if isinstance(message, CallMessage) else message
            return ChatChunk(choices=[ChatDelta(index=number, delta=delta, **fields)], **common_fields)

        def build_usage_chunk() -> ChatChunk:
            return ChatChunk(choices=[], usage=answers.usage, **common_fields)

        include_usage = request.stream_options.include_usage
        events = await answers.events(build_chunk, build_usage_chunk if include_usage else None)
        return EventResponse(events, answers.headers)
    response.headers.update(answers.headers)
    choices = []
    for number, piece in enumerate(await answers.collect_pieces()):
        message, fields = _read_message(plan, piece, "assistant")
        choices.append(ChatChoice(index=number, message=message, **fields))
    return ChatCompletion(choices=choices, usage=answers.usage, **common_fields)


def _read_message(
    plan: AnswerPlan, piece: AnswerPiece, role: Literal["assistant"] | None
) -> tuple[CallMessage | ChatResponseMessage, dict[str, Any]]:
    """Return the message of a piece of an answer, which may call tools, and the other fields of its choice."""
    fields = _choice_fields(piece)
    if plan.read and (message := plan.read(piece.text)):
        return message, {**fields, "finish_reason": "tool_calls" if piece.finish_reason == "stop" else "length"}
    return ChatResponseMessage(role=role, content=piece.text), fields


async def _encode_messages(
    service: CompletionService, request: ChatRequest, tools: Sequence[dict[str, Any]]
) -> tuple[int, ...]:
    """Return the token ids of a conversation; messages that do not fit, or no chat template, are a RequestError."""
    template = service.answerer.template
    if template is None:
        message = "this model has no chat template, so it cannot answer conversations; use /v1/completions"
        raise RequestError(400, message, "messages", "no_chat_template")
    messages = template_messages(request)
    # A thread encodes the messages, because a long conversation takes seconds and streams must go on meanwhile.
    try:
        ids = await asyncio.to_thread(service.answerer.encode_chat, template, messages, tools)
    except ServeError as e:
        raise RequestError(400, str(e), "tools" if tools else "messages") from e
    return await service.prompt_ids(ids, True, "messages")


def _choice_fields(piece: AnswerPiece) -> dict[str, Any]:
    logprobs = (
        ChatLogprobs(content=[ChosenLogprob.from_score(score) for score in piece.scores]) if piece.scores else None
    )
    routes = Routes.from_tokens(piece.routes)
    return {"logprobs": logprobs, "finish_reason": piece.finish_reason, "routes": routes}
