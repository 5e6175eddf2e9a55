"""Middleware of Serve's proxies, which turns the errors that a proxy itself reports into the format of OpenAI's errors.

By default a proxy reports a full queue in plain text, and a replica that dies by a bare 500 or the end of a stream. A
proxy installs `middlewares` through the variable `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mhmoe_ray.serving.api.errors import RequestError, error_body, error_response

LOST_REPLICA = RequestError(
    503, "the replica that worked on this request has ended; send it again", code="lost", retry_after=1
)


def middlewares() -> list[Middleware]:
    """Return the middlewares that one of Serve's HTTP proxies installs. Each proxy calls this."""
    return [Middleware(OpenAIErrorMiddleware)]


class OpenAIErrorMiddleware:
    """Middleware that rewrites a proxy's plain-text refusals as OpenAI's errors, and reports a replica that has died.

    A request without a response gets a 503, and a stream that was cut off an error as its last event.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Paths that begin with /-/ are Serve's own, such as its health check, so their responses stay as they are.
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        progress = _ResponseProgress(send)
        await self._app(scope, receive, progress.send)
        if progress.replacement is not None:
            await error_response(progress.replacement)(scope, receive, send)
        elif not progress.headers_sent:
            await error_response(LOST_REPLICA)(scope, receive, send)
        # A stream that was cut off has already sent its HTTP status, so the error can only be the last event of the
        # stream.
        elif not progress.is_complete and progress.is_stream:
            event = f"data: {error_body(LOST_REPLICA).model_dump_json()}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})


class _ResponseProgress:
    """Observer of one response on its way to the client, which holds back a plain-text refusal."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.headers_sent = self.is_complete = self.is_stream = False
        self.replacement: RequestError | None = None
        """Error that replaces a plain-text refusal of the proxy."""

    async def send(self, message: Message) -> None:
        """Pass a message on to the client, or add it to `replacement` if it belongs to a plain-text refusal."""
        if message["type"] == "http.response.start":
            headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            content_type = headers.get("content-type", "")
            self.headers_sent, self.is_stream = True, content_type.startswith("text/event-stream")
            if message["status"] in (404, 408, 429, 503) and not content_type.startswith("application/json"):
                retry_after = headers.get("retry-after", "")
                self.replacement = RequestError(
                    message["status"], "", retry_after=int(retry_after) if retry_after.isdigit() else None
                )
                return
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
            if self.replacement is not None:
                # Serve writes the texts of its errors as JSON strings, so the quotation marks around them are removed.
                self.replacement.detail.message += message.get("body", b"").decode(errors="replace").strip().strip('"')
                return
        await self._send(message)
