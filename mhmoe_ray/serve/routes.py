"""The HTTP routes, as a FastAPI application around one engine. Ray Serve runs it; nothing here knows of Ray."""

import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import chain
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import iterate_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.engine import Engine, Piece
from mhmoe_ray.serve.protocol import (
    Choice,
    Completion,
    CompletionRequest,
    ErrorBody,
    ErrorDetail,
    Model,
    ModelList,
    RequestError,
    Usage,
)
from mhmoe_ray.serve.sampling import Sampling

logger = logging.getLogger("ray.serve")


def create_app(engine: Engine, model: str, max_tokens: int) -> FastAPI:
    """The application that answers with `engine`.

    Args:
        engine: shared by all requests.
        model: its name for clients.
        max_tokens: the most that a request may ask for.
    """
    app = FastAPI(title="mhmoe-ray", exception_handlers=_HANDLERS)
    started = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[Model(id=model, created=started, max_model_len=engine.seq_len)])

    @app.post("/v1/completions", response_model=Completion)
    async def completions(request: CompletionRequest) -> Response | Completion:
        (prompt,) = request.prompt
        if request.model not in (None, model):
            message = f"there is no model {request.model!r} here; this server has {model!r}"
            raise RequestError(404, message, "model", "model_not_found")
        if request.max_tokens > max_tokens:
            message = f"max_tokens is {request.max_tokens}, and this server allows at most {max_tokens}"
            raise RequestError(400, message, "max_tokens")
        try:
            prompt_ids = engine.encode(prompt)
        except ServeError as e:
            raise RequestError(400, str(e), "prompt", "context_length_exceeded") from e
        sampling = Sampling(request.max_tokens, request.temperature, request.top_p, request.seed)
        echo = [Piece(prompt, 0)] if request.echo else []
        # One token per step in a worker thread: between steps a cancelled request ends, and others get their turn.
        pieces = iterate_in_threadpool(chain(echo, engine.complete(prompt_ids, sampling, request.stop)))
        answer = _Answer(model, len(prompt_ids))
        if request.stream:
            return StreamingResponse(_events(answer, pieces), media_type="text/event-stream")
        parts = [piece async for piece in pieces]
        return answer.body("".join(p.text for p in parts), parts[-1])

    return app


class _Answer:
    """The bodies of one response, under one id."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._model, self._prompt_tokens = model, prompt_tokens
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    def body(self, text: str, last: Piece) -> Completion:
        """A body with this text, and with the usage if `last` ends the answer."""
        usage = None
        if last.finish_reason is not None:
            total = self._prompt_tokens + last.tokens
            usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=last.tokens, total_tokens=total)
        choices = [Choice(text=text, finish_reason=last.finish_reason)]
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


async def _events(answer: _Answer, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """Server-sent events: chunks, then [DONE]; after a failure an error body in its place."""
    try:
        async for piece in pieces:
            if piece.text or piece.finish_reason:
                yield _event(answer.body(piece.text, piece))
    except Exception:
        logger.exception("A streamed answer failed.")
        yield _event(_INTERNAL)
    else:
        yield "data: [DONE]\n\n"


def _event(body: Completion | ErrorBody) -> str:
    return f"data: {body.model_dump_json()}\n\n"


_INTERNAL = ErrorBody(error=ErrorDetail(message="the server failed; its log says why", type="server_error"))


def _error(status: int, detail: ErrorDetail) -> Response:
    return JSONResponse(ErrorBody(error=detail).model_dump(), status)


async def _refused(_: Request, error: RequestError) -> Response:
    return _error(error.status, error.detail)


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    """The first field that is wrong, named; one that is not supported comes before a wrong value."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # A location is ("body", field, place in a list).
    param = str(first["loc"][1]) if len(first["loc"]) > 1 and first["type"] != "json_invalid" else None
    if first["type"] == "extra_forbidden":
        return _error(
            400, ErrorDetail(message=f"{param!r} is not supported", param=param, code="unsupported_parameter")
        )
    if first["type"] == "json_invalid":
        return _error(400, ErrorDetail(message="the body is not JSON"))
    what = f"{param!r}" if param else "the body"
    return _error(400, ErrorDetail(message=f"{what}: {first['msg']}", param=param))


async def _http(request: Request, error: HTTPException) -> Response:
    """Unknown paths and methods."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error(error.status_code, ErrorDetail(message=message))


async def _failed(_: Request, error: Exception) -> Response:
    """Anything else; the framework logs the traceback, and the client gets none of it."""
    return JSONResponse(_INTERNAL.model_dump(), 500)


_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    RequestError: _refused,
    RequestValidationError: _invalid,
    HTTPException: _http,
    Exception: _failed,
}
