"""The routes without Ray: what a client reads when something is wrong, and that a client who leaves costs nothing."""

import asyncio
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.serve.engine import Engine
from mhmoe_ray.serve.routes import create_app

from .conftest import SEQ_LEN, build_model


def call(app, method, path, **request) -> httpx.Response:
    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


@pytest.fixture
def app(engine):
    return create_app(engine, "tiny", max_tokens=40)


@pytest.mark.parametrize(
    ("wrong", "param", "code", "says"),
    [
        ({"best_of": 3}, "best_of", "unsupported_parameter", "'best_of' is not supported"),
        ({"logprobs": 1}, "logprobs", "unsupported_parameter", "'logprobs' is not supported"),
        ({"logit_bias": {"1": 2}, "temperature": -1}, "logit_bias", "unsupported_parameter", "not supported"),
        ({"n": 2}, "n", None, "should be 1"),
        ({"temperature": 2.5}, "temperature", None, "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", None, "valid number"),
        ({"top_p": 0}, "top_p", None, "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", None, "greater than or equal to 1"),
        ({"max_tokens": 41}, "max_tokens", None, "max_tokens is 41, and this server allows at most 40"),
        ({"seed": 2**64}, "seed", None, "less than"),
        ({"prompt": ["a", "b"]}, "prompt", None, "at most 1 item"),
        ({"prompt": [1, 2]}, "prompt", None, "valid string"),
        ({"prompt": "\ud800"}, "prompt", None, "surrogates not allowed"),
        ({"prompt": None}, "prompt", None, "required"),
        ({"stop": ""}, "stop", None, "at least 1 character"),
        ({"stop": list("abcde")}, "stop", None, "at most 4 items"),
        ({"prompt": "z" * SEQ_LEN}, "prompt", "context_length_exceeded", f"may have {SEQ_LEN}"),
    ],
)
def test_a_wrong_field_is_named(app, wrong, param, code, says):
    body = json.dumps({"prompt": "the", **wrong})  # ASCII, so that a lone surrogate reaches the server as an escape
    response = call(app, "POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert says in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "says"),
    [
        ("POST", "/v1/completions", {"content": "{"}, 400, "not JSON"),
        ("POST", "/v1/completions", {"json": [1]}, 400, "the body"),
        ("POST", "/v1/completions", {}, 400, "the body"),
        ("POST", "/v1/completions", {"json": {}}, 400, "'prompt': Field required"),
        ("POST", "/v1/completions", {"json": {"prompt": "a", "model": "gpt"}}, 404, "this server has 'tiny'"),
        ("POST", "/v1/chat/completions", {"json": {}}, 404, "/v1/chat/completions: Not Found"),
        ("GET", "/v1/completions", {}, 405, "Method Not Allowed"),
    ],
)
def test_wrong_requests_get_a_body_of_openais_shape(app, method, path, request_, status, says):
    if "content" in request_:
        request_ = {**request_, "headers": {"content-type": "application/json"}}
    response = call(app, method, path, **request_)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert says in response.json()["error"]["message"]


def test_null_is_absent(app):
    body = {"prompt": ["the"], "temperature": 0}
    nulls = {"max_tokens": None, "stop": None, "logprobs": None, "n": None, "seed": None}
    plain, with_nulls = (call(app, "POST", "/v1/completions", json=b).json() for b in (body, {**body, **nulls}))
    assert with_nulls["choices"] == plain["choices"]


@pytest.fixture
def broken_app(tokenizer):
    """A model that fails at its third step."""
    model, calls = build_model(), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a secret of the server")

    model.register_forward_hook(fail)
    return create_app(Engine(model, tokenizer, SEQ_LEN), "tiny", 40)


def test_a_failure_tells_the_client_nothing_of_its_inside(broken_app):
    response = call(broken_app, "POST", "/v1/completions", json={"prompt": "the", "temperature": 0})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_a_failure_in_mid_stream_is_an_event_and_no_done(broken_app, caplog):
    response = call(broken_app, "POST", "/v1/completions", json={"prompt": "the", "temperature": 0, "stream": True})
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert json.loads(events[-1])["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "a secret of the server" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_work(tokenizer, stream):
    model, steps = build_model(), []
    reached = asyncio.Event()

    async def leave_early():
        loop = asyncio.get_running_loop()

        def count(*_):
            steps.append(1)
            if len(steps) == 5:
                loop.call_soon_threadsafe(reached.set)

        model.register_forward_hook(count)
        app = create_app(Engine(model, tokenizer, 4096), "tiny", 4000)
        # Greedy, and so always far from the end of text when the client leaves.
        body = {"prompt": "the quick", "max_tokens": 4000, "temperature": 0, "stream": stream}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            request = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.wait_for(reached.wait(), timeout=60)
            # Serve cancels the task of a request whose client has gone.
            request.cancel()
            await asyncio.wait([request])
        assert request.cancelled()
        at_the_end = len(steps)
        await asyncio.sleep(0.1)
        assert len(steps) == at_the_end < 4000

    asyncio.run(leave_early())


@settings(max_examples=30)
@given(
    temperature=st.sampled_from([0, 0.7, 1.5]),
    seed=st.integers(0, 1000),
    stop=st.lists(st.text("aeiou th", min_size=1, max_size=2), max_size=2),
    echo=st.booleans(),
)
def test_chunks_join_to_the_plain_answer(engine, temperature, seed, stop, echo):
    app = create_app(engine, "tiny", max_tokens=40)
    body = {"prompt": "the", "temperature": temperature, "seed": seed, "stop": stop, "echo": echo}
    plain = call(app, "POST", "/v1/completions", json=body).json()
    streamed = call(app, "POST", "/v1/completions", json={**body, "stream": True})
    *chunks, done = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    chunks = [json.loads(c) for c in chunks]
    assert done == "[DONE]"
    assert len({c["id"] for c in chunks}) == 1
    assert "".join(c["choices"][0]["text"] for c in chunks) == plain["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == plain["usage"]
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert plain["choices"][0]["text"].startswith("the") or not echo
