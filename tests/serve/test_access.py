"""Access to the server: the clients that may ask, and limits on the number, size and duration of their requests."""

import asyncio
import hashlib
import json
from contextlib import aclosing

import httpx
import pytest

from mhmoe_ray.cli.serve_choice import with_keys
from mhmoe_ray.errors import SpecError
from mhmoe_ray.serve.api.access import Bucket, Limits
from mhmoe_ray.serve.api.app import create_app
from mhmoe_ray.serve.engine import Request, Sampling
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.serve.asking import call
from tests.serve.conftest import SEQ_LEN, build_model
from tests.serve.own import answerer_of

BODY = {"prompt": "the quick", "temperature": 0, "max_tokens": 8}


def key(name, **limits):
    return KeySpec(name=name, sha256=hashlib.sha256(f"secret of {name}".encode()).hexdigest(), **limits)


def bearer(name):
    return {"authorization": f"Bearer secret of {name}"}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_bucket_fills_over_a_minute_and_no_more_than_once():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.spend(60)
    assert bucket.wait() == 1
    clock.now += 1
    assert bucket.wait() == 0
    bucket.spend(100)  # more than there is, once
    assert bucket.wait() == 100
    clock.now += 10_000
    assert bucket.wait() == 0
    bucket.spend(60)
    assert bucket.wait() > 0


def test_prompts_are_logged_only_where_that_is_asked_for(answerer, caplog):
    caplog.set_level("INFO")
    for spec in (ServeSpec(), ServeSpec(log_prompts=True)):
        app = create_app(answerer, "tiny", spec)
        assert call(app, "POST", "/v1/completions", json=BODY).status_code == 200
        told = [record.getMessage() for record in caplog.records if "the quick" in record.getMessage()]
        assert told == ["somebody asks: 'the quick'"] * spec.log_prompts


def test_each_client_has_limits_of_its_own():
    clock = Clock()
    limits = Limits([key("a", requests_per_minute=2), key("b", tokens_per_minute=60), key("c")], clock)

    def begin(client):
        return asyncio.run(limits.begin(client))

    assert begin("a") is None
    assert begin("a") is None
    assert begin("a") == ("requests", 30)
    for client in ("b", "c"):
        assert begin(client) is None
        limits.used(client, 100)
    assert begin("b") == ("tokens", 41)
    assert begin("c") is None
    clock.now += 41
    assert begin("a") is None
    assert begin("b") is None


@pytest.fixture
def app(answerer):
    keys = (key("ann"), key("bob", requests_per_minute=2), key("eve", tokens_per_minute=10))
    return create_app(answerer, "tiny", ServeSpec(max_body_bytes=2000, keys=keys))


GUARDED = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/metrics"),
    ("GET", "/stats"),
]


def test_all_but_health_is_guarded(app):
    routes = {(method.upper(), path) for path, found in app.openapi()["paths"].items() for method in found}
    assert routes == {*GUARDED, ("GET", "/health"), ("GET", "/ready")}


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "secret of ann"}])
@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_without_a_key_there_is_nothing_to_see(app, headers, method, path):
    response = call(app, method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"
    assert call(app, "GET", "/health").status_code == call(app, "GET", "/ready").status_code == 200


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_the_scheme_of_a_key_may_be_in_small_letters(app, scheme):
    headers = {"authorization": f"{scheme} secret of ann"}
    assert call(app, "GET", "/v1/models", headers=headers).status_code == 200


def test_a_key_more_of_a_name_has_its_limits(answerer, monkeypatch):
    """Keys can thus be changed one after the other."""
    monkeypatch.setenv("MHMOE_API_KEYS", "bob:another,new:one")
    spec = with_keys(ServeSpec(keys=(key("bob", requests_per_minute=2),)))
    assert [(one.name, one.requests_per_minute) for one in spec.keys] == [("bob", 2), ("bob", 2), ("new", None)]
    app = create_app(answerer, "tiny", spec)
    keys = ["secret of bob", "another", "another", "secret of bob", "one"]
    sent = [call(app, "POST", "/v1/completions", json=BODY, headers={"authorization": f"Bearer {k}"}) for k in keys]
    assert [response.status_code for response in sent] == [200, 200, 429, 429, 200]


def test_two_keys_of_a_name_have_the_same_limits(monkeypatch):
    monkeypatch.delenv("MHMOE_API_KEYS", raising=False)
    old, new = key("bob", requests_per_minute=2), KeySpec(name="bob", sha256="0" * 64, requests_per_minute=2)
    assert with_keys(ServeSpec(keys=(old, new))).keys == (old, new)
    unlimited = new.model_copy(update={"requests_per_minute": None})
    with pytest.raises(SpecError, match=r"serve\.keys, bob: two keys of this name have different limits"):
        with_keys(ServeSpec(keys=(old, unlimited)))


def test_a_client_that_asks_too_often_is_told_when_to_come_back_and_others_are_not_kept(app):
    codes = [call(app, "POST", "/v1/completions", json=BODY, headers=bearer("bob")).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    refused = call(app, "POST", "/v1/completions", json=BODY, headers=bearer("bob"))
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 31
    assert call(app, "POST", "/v1/completions", json=BODY, headers=bearer("ann")).status_code == 200


def test_tokens_of_streamed_answers_count_too(app):
    first = call(app, "POST", "/v1/completions", json={**BODY, "stream": True}, headers=bearer("eve"))
    assert first.text.endswith("[DONE]\n\n")
    second = call(app, "POST", "/v1/completions", json={**BODY, "stream": True}, headers=bearer("eve"))
    assert (first.status_code, second.status_code) == (200, 429)
    assert "all its tokens" in second.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(app, chunked):
    body = json.dumps({"prompt": "z" * 3000}).encode()

    async def parts():
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    headers = {"content-type": "application/json", **bearer("ann")}
    response = call(app, "POST", "/v1/completions", content=parts() if chunked else body, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends(answerer, stream):
    app = create_app(answerer, "tiny", ServeSpec(request_timeout=1e-6))
    response = call(app, "POST", "/v1/completions", json={**BODY, "max_tokens": SEQ_LEN - 8, "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "timeout"


def test_a_counter_that_does_not_answer_keeps_those_with_limits_no_longer_than_a_request_may_take_and_others_not(
    answerer,
):
    """The counter is silent on a cluster while the actor that counts for all replicas is restarted."""
    asked = []

    class Silent:
        async def begin(self, client):
            asked.append(client)
            await asyncio.sleep(30)

        def used(self, client, tokens):
            asked.append(client)

    keys = (key("ann"), key("bob", requests_per_minute=2))
    app = create_app(answerer, "tiny", ServeSpec(request_timeout=5, keys=keys), limits=Silent())
    late, free = (call(app, "POST", "/v1/completions", json=BODY, headers=bearer(name)) for name in ("bob", "ann"))
    assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
    assert late.json()["error"]["message"] == "there was no answer within 5 s; ask for less, or later"
    assert (free.status_code, asked) == (200, ["bob"])


@pytest.mark.parametrize("stream", [False, True])
def test_one_too_many_is_told_to_come_back_and_has_used_nothing(tokenizer, stream):
    spec = ServeSpec(max_concurrency=1, max_waiting=1, max_tokens=4000, keys=(key("eve", tokens_per_minute=1),))
    answerer = answerer_of(build_model(), tokenizer, 4096, spec)
    app = create_app(answerer, "tiny", spec)
    body = {**BODY, "n": 2, "max_tokens": 3000, "stream": stream}

    async def refused():
        """Send two requests while the engine is fully occupied, and return the responses."""
        first = answerer.answer(Request((1,), Sampling(4000, temperature=0)))
        await anext(first)
        transport = httpx.ASGITransport(app)
        async with aclosing(first), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.post("/v1/completions", json=body, headers=bearer("eve")) for _ in range(2)]

    responses = asyncio.run(refused())
    answerer.engine.close()
    for response in responses:
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "busy"


def test_more_choices_than_the_server_takes_are_refused_for_good(answerer):
    app = create_app(answerer, "tiny", ServeSpec(max_concurrency=1, max_waiting=1))
    response = call(app, "POST", "/v1/completions", json={**BODY, "n": 3})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "3 choices are more than the 2 that this server takes at a time"


def test_metrics_are_what_the_engine_counts(answerer):
    app = create_app(answerer, "tiny", ServeSpec(), replica="r1")
    before = answerer.engine.stats()
    call(app, "POST", "/v1/completions", json=BODY)
    text = call(app, "GET", "/metrics").text
    labels = '{model="tiny",replica="r1"}'
    assert f"mhmoe_answer_tokens_total{labels} {before.answer_tokens + 8:.1f}" in text
    assert f"mhmoe_first_token_seconds_count{labels} {before.first_token.count + 1:.1f}" in text
    assert f"mhmoe_running{labels} 0.0" in text
    assert 'mhmoe_expert_routes_total{expert="3",layer="0",model="tiny",replica="r1"}' in text
