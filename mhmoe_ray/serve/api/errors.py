"""Error responses: bodies in OpenAI's shape, without any detail of the server's internals."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mhmoe_ray.serve.api.schema import ErrorBody, ErrorDetail, ErrorType
from mhmoe_ray.serve.engine import BusyError, EngineError

logger = logging.getLogger("ray.serve")
INTERNAL = ErrorBody(error=ErrorDetail(message="the server failed; its log says why", type="server_error"))
RETRY_SECONDS = "1"


class RequestError(Exception):
    """A request that cannot be answered; the client gets `status`, and `detail` as the body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Describe the error.

        Args:
            status: HTTP status code.
            message: what happened, why, and what to do.
            param: name of the field that is wrong.
            code: error code for programs.
            retry_after: seconds after which the client may try again.
        """
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(
            message=message, type=_TYPES.get(status, "invalid_request_error"), param=param, code=code
        )
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


_TYPES: dict[int, ErrorType] = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}


def body_of(error: Exception) -> ErrorBody:
    """Return the body of an error in the middle of a stream, whose HTTP status has been sent already."""
    if isinstance(error, RequestError):
        return ErrorBody(error=error.detail)
    if isinstance(error, BusyError):
        return ErrorBody(error=_busy_detail(error))
    logger.error("An answer failed.", exc_info=error)
    return INTERNAL


def _error(status: int, detail: ErrorDetail, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, headers)


def error_response(error: RequestError) -> Response:
    return _error(error.status, error.detail, error.headers)


async def _refused(_: Request, error: RequestError) -> Response:
    return error_response(error)


def _busy_detail(error: BusyError) -> ErrorDetail:
    return ErrorDetail(message=f"the server is busy: {error}", type="rate_limit_error", code="busy")


async def _busy(_: Request, error: BusyError) -> Response:
    return _error(429, _busy_detail(error), {"Retry-After": RETRY_SECONDS})


async def _broken(_: Request, error: EngineError) -> Response:
    logger.error("The engine cannot answer: %s", error)
    return _error(503, ErrorDetail(message="the server cannot answer now; its log says why", type="server_error"))


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    """Return a 400 that names the first wrong field; an unsupported field takes precedence over a wrong value."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # A location is ("body", field, place in a list).
    param = str(first["loc"][1]) if len(first["loc"]) > 1 and first["type"] != "json_invalid" else None
    if first["type"] == "extra_forbidden":
        message = f"{param!r} is not supported"
        return _error(400, ErrorDetail(message=message, param=param, code="unsupported_parameter"))
    if first["type"] == "json_invalid":
        return _error(400, ErrorDetail(message="the body is not JSON"))
    if isinstance(error.body, bytes):  # FastAPI reads what is declared to be JSON, and nothing else
        return _error(
            400, ErrorDetail(message="the body is not declared to be JSON; send Content-Type: application/json")
        )
    what = f"{param!r}" if param else "the body"
    return _error(400, ErrorDetail(message=f"{what}: {first['msg']}", param=param))


async def _http(request: Request, error: HTTPException) -> Response:
    """Return the error of an unknown path or method."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error(error.status_code, ErrorDetail(message=message), dict(error.headers or {}))


async def _failed(_: Request, error: Exception) -> Response:
    """Return a 500 for any other exception; the framework logs the traceback, and the client sees none of it."""
    return JSONResponse(INTERNAL.model_dump(), 500)


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "The request is wrong; `param` names the field.",
        401: "There is no such API key.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too many requests; `Retry-After` says when to come back.",
        503: "The server cannot answer, or did not in time.",
    }.items()
}
"""Error responses of all routes that require a key, for the API's description."""

HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    RequestError: _refused,
    BusyError: _busy,
    EngineError: _broken,
    RequestValidationError: _invalid,
    HTTPException: _http,
    Exception: _failed,
}
