"""Middleware of Serve's proxies: error responses that no replica wrote have OpenAI's shape too.

By default a proxy reports in plain text that too many requests wait, and it does not report a replica that dies: a
request gets a bare 500, and a stream just ends. A proxy installs this middleware if
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares`, as it does in a local cluster started by this project.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mhmoe_ray.serve.api.errors import RequestError, body_of, error_response

LOST = RequestError(503, "the replica that worked on this request has ended; send it again", code="lost", retry_after=1)


def middlewares() -> list[Middleware]:
    """Return the middlewares of a proxy. Each proxy calls this."""
    return [Middleware(OpenAIErrors)]


class OpenAIErrors:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Serve's own
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if answer.plain is not None:
            await error_response(answer.plain)(scope, receive, send)
        elif not answer.begun:
            await error_response(LOST)(scope, receive, send)
        elif not answer.whole and answer.is_stream:
            event = f"data: {body_of(LOST).model_dump_json()}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})


class _Answer:
    """The progress of one response through the middleware."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.whole = self.is_stream = False
        self.plain: RequestError | None = None
        """Error that replaces a plain-text refusal of the proxy, which is held back; None if there is none."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            kind = headers.get("content-type", "")
            self.begun, self.is_stream = True, kind.startswith("text/event-stream")
            if message["status"] in (408, 429, 503) and not kind.startswith("application/json"):
                retry = headers.get("retry-after", "")
                self.plain = RequestError(message["status"], "", retry_after=int(retry) if retry.isdigit() else None)
                return
        elif message["type"] == "http.response.body":
            self.whole = not message.get("more_body", False)
            if self.plain is not None:
                self.plain.detail.message += message.get("body", b"").decode(errors="replace").strip().strip('"')
                return
        await self._send(message)
