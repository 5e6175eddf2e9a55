"""Changes that a proxy of Serve makes to answers that no replica gave."""

import json

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from mhmoe_ray.serve.api.proxy import OpenAIErrors
from tests.serve.asking import call


def through(app, path="/v1/completions"):
    return call(OpenAIErrors(app), "POST", path)


async def dies(scope, receive, send):
    pass


async def dies_in_a_stream(scope, receive, send):
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]},
    )
    await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})


async def streams(scope, receive, send):
    events = iter([b"data: 1\n\n", b"data: [DONE]\n\n"])
    await StreamingResponse(events, media_type="text/event-stream")(scope, receive, send)


def test_a_request_whose_replica_died_may_be_sent_again():
    response = through(dies)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "lost")
    assert "send it again" in error["message"]


def test_a_stream_whose_replica_died_ends_with_an_error_and_not_with_done():
    events = [line.removeprefix("data: ") for line in through(dies_in_a_stream).text.splitlines() if line]
    assert events[0] == "{}"
    assert json.loads(events[1])["error"]["code"] == "lost"
    assert len(events) == 2


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limit_error"), (503, "server_error")])
def test_a_refusal_of_serves_own_has_the_shape_that_clients_know(status, kind):
    """Serve writes its texts as JSON strings."""
    response = through(PlainTextResponse('"too many wait"', status, {"Retry-After": "7"}))
    assert response.status_code == status
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"] == {"message": "too many wait", "type": kind, "param": None, "code": None}


@pytest.mark.parametrize(
    "app",
    [
        JSONResponse({"error": {"message": "own"}}, 429, {"Retry-After": "3"}),
        PlainTextResponse("as it is", 404),
        streams,
    ],
)
def test_what_a_replica_says_goes_through_as_it_is(app):
    plain, found = call(app, "POST", "/v1/completions"), through(app)
    assert (found.status_code, found.content, found.headers) == (plain.status_code, plain.content, plain.headers)


def test_serves_own_pages_stay_as_they_are():
    assert through(PlainTextResponse("draining", 503), "/-/healthz").text == "draining"
