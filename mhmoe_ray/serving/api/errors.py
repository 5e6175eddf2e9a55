"""Error responses in the format of OpenAI's API, without details of the server's internals."""

import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mhmoe_ray.serving.api.schema import ErrorBody, ErrorDetail, ErrorType, NeutralFields
from mhmoe_ray.serving.engine import BusyError, EngineError

logger = logging.getLogger("ray.serve")
INTERNAL_ERROR = ErrorBody(error=ErrorDetail(message="the server failed; its log says why", type="server_error"))


class RequestError(Exception):
    """Error of a request that cannot be answered; the client gets `status`, and `detail` as the body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Describe the error; `param` is the wrong field, `code` is for programs, `retry_after` is in seconds."""
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(
            message=message, type=_TYPE_BY_STATUS.get(status, "invalid_request_error"), param=param, code=code
        )
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        # HTTP requires this header in each 401 response.
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


_TYPE_BY_STATUS: dict[int, ErrorType] = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}


def error_body(error: Exception) -> ErrorBody:
    """Return the body that reports an error in the middle of a stream, whose HTTP status has been sent already.

    An error other than RequestError and BusyError is logged, and the client gets no details.
    """
    if isinstance(error, RequestError):
        return ErrorBody(error=error.detail)
    if isinstance(error, BusyError):
        return ErrorBody(error=_busy_error(error).detail)
    logger.error("An answer failed.", exc_info=error)
    return INTERNAL_ERROR


def error_response(error: RequestError) -> Response:
    """Return the HTTP response for an error: its status, its detail as the body, and its headers."""
    return JSONResponse(ErrorBody(error=error.detail).model_dump(), error.status, error.headers)


def _busy_error(error: BusyError) -> RequestError:
    return RequestError(429, f"the server is busy: {error}", code="busy", retry_after=1)


async def _handle_engine_error(_: Request, error: EngineError) -> Response:
    """Log why the engine cannot answer, and return a 503 response without the reason."""
    logger.error("The engine cannot answer: %s", error)
    return error_response(RequestError(503, "the server cannot answer now; its log says why"))


def _field_path(location: Sequence[int | str], body: Any) -> str:
    """Return the path of a field that is unsupported or missing in a body, such as "messages.0.tool_calls".

    `location` is pydantic's location of the field, which ends with its name.
    """
    *parents, name = location
    path, value = [], body
    for parent in parents:
        # Where a value may have one of several types, the location also has the name of a type, which is not in the
        # body.
        with suppress(LookupError, TypeError):
            value = value[parent]
            path.append(parent)
    return ".".join(map(str, (*path, name)))


NEUTRAL_ERRORS = ("literal_error", "too_long", "too_short")
"""Pydantic's errors of values that `NeutralFields` does not allow."""


def _validation_error(error: RequestValidationError) -> RequestError:
    """Return the error that names the first wrong field, unsupported fields first."""

    def is_unsupported(error: dict[str, Any]) -> bool:
        # A neutral field with another value than the allowed ones has a value that would change something.
        is_neutral = any(name in NeutralFields.model_fields for name in error["loc"][1:2])
        return error["type"] == "extra_forbidden" or (is_neutral and error["type"] in NEUTRAL_ERRORS)

    first_error = min(error.errors(), key=lambda e: not is_unsupported(e))
    # Pydantic's location of an error is ("body", field, index in a list, nested field).
    kind, location = first_error["type"], first_error["loc"][1:]
    if kind == "json_invalid":
        return RequestError(400, "the body is not JSON")
    # As in OpenAI's API, `param` is the field of the body, even if the error is in a nested field.
    param = str(location[0]) if location else None
    if is_unsupported(first_error):
        path = _field_path(location, error.body) if kind == "extra_forbidden" else param
        return RequestError(400, f"{path!r} is not supported", param, "unsupported_parameter")
    # FastAPI parses only bodies that are declared to be JSON, and passes others on as bytes.
    if isinstance(error.body, bytes):
        return RequestError(400, "the body is not declared to be JSON; send Content-Type: application/json")
    subject = "the body" if param is None else repr(_field_path(location, error.body) if kind == "missing" else param)
    return RequestError(400, f"{subject}: {first_error['msg']}", param)


async def _handle_http_error(request: Request, error: HTTPException) -> Response:
    response = error_response(RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
    response.headers.update(error.headers or {})
    return response


async def _handle_exception(_: Request, error: Exception) -> Response:
    """Return a 500 response for any other exception; the framework logs its traceback."""
    return JSONResponse(INTERNAL_ERROR.model_dump(), 500)


_DESCRIPTIONS: dict[int | str, str] = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no such API key.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests; `Retry-After` says when to come back.",
    # Without this entry, FastAPI declares a 422 for invalid requests, which this server answers with a 400.
    "4XX": "The request is wrong in another way.",
    503: "The server cannot answer, or did not in time.",
}
RESPONSES = {status: {"model": ErrorBody, "description": text} for status, text in _DESCRIPTIONS.items()}
"""Error responses of the routes that require an API key, for the OpenAPI description."""


def _handler(convert: Callable[[Any], RequestError]) -> Callable[[Request, Any], Coroutine[Any, Any, Response]]:
    async def handle(_: Request, error: Exception) -> Response:
        return error_response(convert(error))

    return handle


# The first three are errors of this server, the next two are errors of FastAPI, and the last handles all others.
HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    RequestError: _handler(lambda error: error),
    BusyError: _handler(_busy_error),
    EngineError: _handle_engine_error,
    RequestValidationError: _handler(_validation_error),
    HTTPException: _handle_http_error,
    Exception: _handle_exception,
}
