"""Tests of the middleware of Serve's proxies, which changes error responses that no replica wrote."""

import json

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from mhmoe_ray.serving.api.proxy import OpenAIErrorMiddleware
from tests.serving.asking import call


def send_through_proxy(app, path="/v1/completions"):
    return call(OpenAIErrorMiddleware(app), "POST", path)


async def dying_app(scope, receive, send):
    """End without a response, like a replica that dies."""
    pass


async def app_dying_in_a_stream(scope, receive, send):
    """Begin a stream and end before it is complete, like a replica that dies."""
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]},
    )
    await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})


async def streaming_app(scope, receive, send):
    events = iter([b"data: 1\n\n", b"data: [DONE]\n\n"])
    await StreamingResponse(events, media_type="text/event-stream")(scope, receive, send)


def test_lost_replica_gives_a_retryable_error():
    response = send_through_proxy(dying_app)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "lost")
    assert "send it again" in error["message"]


def test_lost_replica_ends_a_stream_with_an_error_event():
    events = [
        line.removeprefix("data: ") for line in send_through_proxy(app_dying_in_a_stream).text.splitlines() if line
    ]
    assert events[0] == "{}"
    assert json.loads(events[1])["error"]["code"] == "lost"
    assert len(events) == 2


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")]
)
def test_refusals_of_serve_get_an_openai_error_body(status, kind):
    """A refusal of Serve, whose text is a JSON string, gets an error body of OpenAI's form with the same text."""
    response = send_through_proxy(PlainTextResponse('"too many wait"', status, {"Retry-After": "7"}))
    assert response.status_code == status
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"] == {"message": "too many wait", "type": kind, "param": None, "code": None}


@pytest.mark.parametrize(
    "app",
    [
        JSONResponse({"error": {"message": "own"}}, 429, {"Retry-After": "3"}),
        PlainTextResponse("as it is", 405),
        streaming_app,
    ],
)
def test_responses_of_replicas_pass_unchanged(app):
    expected, response = call(app, "POST", "/v1/completions"), send_through_proxy(app)
    assert (response.status_code, response.content, response.headers) == (
        expected.status_code,
        expected.content,
        expected.headers,
    )


def test_pages_of_serve_pass_unchanged():
    assert send_through_proxy(PlainTextResponse("draining", 503), "/-/healthz").text == "draining"
