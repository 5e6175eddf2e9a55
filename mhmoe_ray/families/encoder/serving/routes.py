"""The routes of encoders: POST /v1/embeddings, /rerank and /routes, and POST /v1/chat/completions for captions.

Images are data URLs. /v1/embeddings has OpenAI's format, and takes an image in place of a text. /rerank has the format
of Cohere's and Jina's clients. A conversation with one image is answered with the image's caption.
"""

import base64
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Depends, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, Field

from mhmoe_ray.errors import ServeError
from mhmoe_ray.families.encoder.serving.answer import EncoderAnswerer
from mhmoe_ray.families.encoder.serving.request import MAX_DOCUMENTS, EncodeRequest, Encoding
from mhmoe_ray.families.images.routes import RoutesRequest, image_request
from mhmoe_ray.serving.api.access import Client
from mhmoe_ray.serving.api.errors import RequestError
from mhmoe_ray.serving.api.schema import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatResponseMessage,
    NeutralFields,
    StreamOptions,
    StrictRequest,
    Usage,
)
from mhmoe_ray.serving.api.service import TextService
from mhmoe_ray.serving.sampling import PositiveNumber, Text, wrap_text

Inputs = Annotated[list[Text], Field(min_length=1, max_length=MAX_DOCUMENTS)]
EncoderService = TextService[EncoderAnswerer]
Reader = Callable[[], Awaitable[EncodeRequest]]


class EmbeddingRequest(StrictRequest):
    """A request for the vectors of texts and images."""

    input: Annotated[Inputs, BeforeValidator(wrap_text, Text | Inputs)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    """Client's identifier of its end user, as in OpenAI's API; it is accepted and ignored."""


class Embedding(BaseModel):
    """Vector of a text or an image, of length 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """The values, or with `encoding_format: base64` their bytes as little-endian float32."""


class EmbeddingUsage(BaseModel):
    """Numbers of tokens of a request for vectors; an image counts one token for each patch and one more."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Vectors of the texts and images of a request, in the request's order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class RerankDocument(StrictRequest):
    """A document to rank: a text, or an image as a data URL."""

    text: Text | None = None
    image: Text | None = None


Query = Text | RerankDocument


class RerankRequest(StrictRequest):
    """A request to order documents by how well they match a query; both may be texts or images."""

    query: Query
    documents: Annotated[list[Query], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    model: str | None = None
    top_n: PositiveNumber | None = None
    return_documents: bool = False


class RankedDocument(BaseModel):
    """A document of a request to /rerank, with the score of how well it matches the query."""

    index: int
    relevance_score: float
    """Cosine of the document's vector and the query's vector."""
    document: dict[str, str] | None = None


class RerankResponse(BaseModel):
    """Documents that match a query, best first; documents with equal scores stay in the order of the request."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage


class Routes(BaseModel):
    """Experts that the sub-tokens of an image's patches chose first, in each layer with experts."""

    model: str
    patches_per_side: int
    experts: int
    routes: list[list[list[int]]]
    """Index of the first-choice expert, by layer, patch (row by row) and head."""


class Names(BaseModel):
    """Captions of the training data's held-out images, which the web page proposes as names of images."""

    names: list[str]


class ImageUrl(StrictRequest):
    url: Text
    detail: str | None = None
    """Resolution that the client asks for, as in OpenAI's API; it is ignored, because the model has only one."""


class ContentPart(StrictRequest):
    """Part of a chat message: an image, or a text. A text has no effect, because the model only reads the image."""

    type: Literal["text", "image_url"]
    text: Text | None = None
    image_url: ImageUrl | None = None


class CaptionMessage(StrictRequest):
    role: Literal["system", "user"]
    content: Text | list[ContentPart]


class CaptionRequest(NeutralFields):
    """A conversation with one image, whose caption is the answer."""

    messages: Annotated[list[CaptionMessage], Field(min_length=1)]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = None
    """Sampling temperature. Clients send it by default, but it has no effect: a caption has the most likely tokens."""
    max_tokens: PositiveNumber | None = None
    max_completion_tokens: PositiveNumber | None = None
    n: Literal[1] = 1


def encoder_routers(service: EncoderService) -> list[APIRouter]:
    """Return routers with the routes that an encoder can answer: vectors, captions or both, and proposed names."""
    routers = [_names_router(service)]
    if service.answerer.has_vectors:
        routers.append(vectors_router(service))
    if service.answerer.writes_captions:
        routers.append(captions_router(service))
    return routers


def _names_router(service: EncoderService) -> APIRouter:
    routes = APIRouter()

    @routes.get("/names", dependencies=[Depends(service.access.authenticate)])
    async def names() -> Names:
        """Return captions of held-out images, which the web page proposes as names of images."""
        return Names(names=service.answerer.names)

    return routes


def vectors_router(service: EncoderService) -> APIRouter:
    """Return a router with the routes POST /v1/embeddings, /rerank and /routes."""
    routes, answerer = APIRouter(), service.answerer

    @routes.post("/v1/embeddings")
    async def embeddings(
        request: EmbeddingRequest, client: Annotated[Client, Depends(service.access.authenticate)]
    ) -> EmbeddingList:
        service.check_model(request.model)
        readers = [partial(answerer.read, value) for value in request.input]
        encodings, usage = await _answer(service, client, readers, "input")
        data = [
            Embedding(index=number, embedding=_encode(encoding, request.encoding_format))
            for number, encoding in enumerate(encodings)
        ]
        return EmbeddingList(data=data, model=service.model, usage=usage)

    @routes.post("/rerank")
    @routes.post("/v1/rerank", include_in_schema=False)
    async def rerank(
        request: RerankRequest, client: Annotated[Client, Depends(service.access.authenticate)]
    ) -> RerankResponse:
        service.check_model(request.model)
        documents = [_Document(document, "documents") for document in request.documents]
        readers = [partial(document.read, answerer) for document in (_Document(request.query, "query"), *documents)]
        [query_encoding, *encodings], usage = await _answer(service, client, readers, "documents")
        scores = np.stack([_vector(encoding) for encoding in encodings]) @ _vector(query_encoding)
        order = np.argsort(-scores, kind="stable")[: request.top_n]
        results = [
            RankedDocument(
                index=int(number),
                relevance_score=float(scores[number]),
                document=documents[number].content if request.return_documents else None,
            )
            for number in order
        ]
        return RerankResponse(id=f"rerank-{uuid.uuid4().hex}", model=service.model, results=results, usage=usage)

    @routes.post("/routes")
    async def image_routes(
        request: RoutesRequest, client: Annotated[Client, Depends(service.access.authenticate)]
    ) -> Routes:
        """Return the experts that an image's patches choose."""
        service.check_model(request.model)
        [encoding], _ = await _answer(service, client, [partial(answerer.read_image, request.image)], "image")
        choices = [] if encoding.expert_LSH is None else encoding.expert_LSH[:, 1:].tolist()
        side = answerer.encoder.patches_per_side
        return Routes(model=service.model, patches_per_side=side, experts=answerer.details.experts, routes=choices)

    return routes


def captions_router(service: EncoderService) -> APIRouter:
    """Return a router with the route POST /v1/chat/completions, which answers an image with its caption."""
    routes, answerer = APIRouter(), service.answerer

    @routes.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat(
        request: CaptionRequest, client: Annotated[Client, Depends(service.access.authenticate)]
    ) -> Response | ChatCompletion:
        service.check_model(request.model)
        max_tokens = service.chat_max_tokens(request.max_completion_tokens, request.max_tokens)
        reader = partial(answerer.read_image, _image_url(request), max_tokens)
        [encoding], prompt_usage = await _answer(service, client, [reader], "messages")
        caption_ids, finish_reason = encoding.caption_ids or [], encoding.finish_reason
        caption = await service.decode(caption_ids)
        usage = Usage(
            prompt_tokens=prompt_usage.prompt_tokens,
            completion_tokens=len(caption_ids),
            total_tokens=prompt_usage.prompt_tokens + len(caption_ids),
        )
        answer_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        message = ChatResponseMessage(role="assistant", content=caption.strip())
        if not request.stream:
            choice = ChatChoice(index=0, message=message, logprobs=None, finish_reason=finish_reason)
            return ChatCompletion(id=answer_id, created=created, model=service.model, choices=[choice], usage=usage)
        # A caption is short, so it is sent as one chunk.
        delta = ChatDelta(index=0, delta=message, logprobs=None, finish_reason=finish_reason)
        chunks = [ChatChunk(id=answer_id, created=created, model=service.model, choices=[delta])]
        if request.stream_options.include_usage:
            chunks.append(ChatChunk(id=answer_id, created=created, model=service.model, choices=[], usage=usage))
        events = [f"data: {chunk.model_dump_json()}\n\n" for chunk in chunks]
        return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream")

    return routes


async def _answer(
    service: EncoderService, client: Client, readers: Sequence[Reader], param: str
) -> tuple[list[Encoding], EmbeddingUsage]:
    """Return the answers to the requests that `readers` decode one after another, and their numbers of tokens.

    An unusable value, a used-up rate limit, or a timeout is a RequestError about the request's field `param`.
    """
    try:
        async with image_request(service, client, param) as request:
            inputs = [await reader() for reader in readers]
            # Only texts are logged, without the start token with which each of them begins.
            service.log_prompts(client, (value.token_ids[1:] for value in inputs if value.image is None))
            encodings = await service.answerer.engine.answer(request, inputs)
    except ServeError as e:
        raise RequestError(400, str(e), param, "context_length_exceeded") from e
    return encodings, EmbeddingUsage(prompt_tokens=request.input_tokens, total_tokens=request.input_tokens)


class _Document:
    """Query or document of a request to /rerank, which is a text or an image."""

    def __init__(self, query: Query, param: str) -> None:
        fields = {"text": query} if isinstance(query, str) else query.model_dump(exclude_none=True)
        if len(fields) != 1:
            raise RequestError(400, f"{param!r}: a document has a text or an image", param)
        self.content: dict[str, str] = fields

    async def read(self, answerer: EncoderAnswerer) -> EncodeRequest:
        """Return the engine's request for the vector of this document; a plain text may be the data URL of an image."""
        if "image" in self.content:
            return await answerer.read_image(self.content["image"])
        return await answerer.read(self.content["text"])


def _image_url(request: CaptionRequest) -> str:
    parts = [part for message in request.messages if not isinstance(message.content, str) for part in message.content]
    urls = [part.image_url.url for part in parts if part.image_url is not None]
    if len(urls) != 1:
        raise RequestError(400, f"'messages' must have one image, and has {len(urls)}", "messages")
    return urls[0]


def _vector(encoding: Encoding) -> np.ndarray:
    assert encoding.vector_W is not None
    return encoding.vector_W


def _encode(encoding: Encoding, encoding_format: str) -> list[float] | str:
    vector = _vector(encoding)
    if encoding_format == "float":
        values: list[float] = vector.tolist()
        return values
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
