"""Tests of access to the server: API keys, and limits on the number, size and duration of requests."""

import asyncio
import hashlib
import json
from contextlib import aclosing

import httpx
import pytest
from pydantic import ValidationError
from starlette.responses import PlainTextResponse

from mhmoe_ray.api.serve_target import with_environment_keys
from mhmoe_ray.errors import SpecError
from mhmoe_ray.serving.api.access import AccessControl, BodyLimits, LocalRateLimiter, TokenBucket
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.engine import Request, SamplingParams
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.serving.asking import call
from tests.serving.conftest import SEQ_LEN, build_model
from tests.serving.own import create_answerer

BODY = {"prompt": "the quick", "temperature": 0, "max_tokens": 8}


def make_key(name, **limits):
    return KeySpec(name=name, sha256=hashlib.sha256(f"secret of {name}".encode()).hexdigest(), **limits)


def bearer_header(name):
    return {"authorization": f"Bearer secret of {name}"}


class Clock:
    """Clock that a test sets by `current_time`, in seconds."""

    current_time = 0.0

    def __call__(self):
        return self.current_time


def test_token_bucket_refills_over_a_minute_up_to_its_capacity():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.spend(60)
    assert bucket.wait_seconds() == 1
    clock.current_time += 1
    assert bucket.wait_seconds() == 0
    bucket.spend(100)  # more than is available, so the bucket is in debt
    assert bucket.wait_seconds() == 100
    clock.current_time += 10_000
    assert bucket.wait_seconds() == 0
    bucket.spend(60)
    assert bucket.wait_seconds() > 0


def test_prompts_are_logged_only_if_requested(answerer, caplog):
    caplog.set_level("INFO")
    for spec in (ServeSpec(), ServeSpec(log_prompts=True)):
        app = create_app(answerer, "tiny", spec)
        assert call(app, "POST", "/v1/completions", json=BODY).status_code == 200
        messages = [record.getMessage() for record in caplog.records if "the quick" in record.getMessage()]
        assert messages == ["somebody asks: 'the quick'"] * spec.log_prompts


def test_rate_limits_are_counted_per_client():
    clock = Clock()
    limits = LocalRateLimiter(
        [make_key("a", requests_per_minute=2), make_key("b", tokens_per_minute=60), make_key("c")], clock
    )

    def begin_request(client):
        return asyncio.run(limits.begin_request(client))

    assert begin_request("a") is None
    assert begin_request("a") is None
    assert begin_request("a") == ("requests", 30)
    for client in ("b", "c"):
        assert begin_request(client) is None
        limits.record_tokens(client, 100)
    assert begin_request("b") == ("tokens", 41)
    assert begin_request("c") is None
    clock.current_time += 41
    assert begin_request("a") is None
    assert begin_request("b") is None


@pytest.fixture
def app(answerer):
    keys = (make_key("ann"), make_key("bob", requests_per_minute=2), make_key("eve", tokens_per_minute=10))
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


def test_all_routes_except_health_checks_are_guarded(app):
    routes = {(method.upper(), path) for path, operations in app.openapi()["paths"].items() for method in operations}
    assert routes == {*GUARDED, ("GET", "/health"), ("GET", "/ready")}


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "secret of ann"}])
@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_requests_without_a_valid_key_are_refused(app, headers, method, path):
    response = call(app, method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"
    assert call(app, "GET", "/health").status_code == call(app, "GET", "/ready").status_code == 200


PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-os",
}


@pytest.mark.parametrize(
    ("origins", "origin", "allowed_origin"),
    [
        (("https://a.com", "http://localhost:3000"), "http://localhost:3000", "http://localhost:3000"),
        (("https://a.com",), "https://b.com", None),
        (("*",), "https://b.com", "*"),
        ((), "https://a.com", None),
    ],
)
def test_only_web_pages_of_named_origins_may_ask(answerer, origins, origin, allowed_origin):
    """A preflight request needs no key; the request after it needs one, and pages can read its refusal."""
    app = create_app(answerer, "tiny", ServeSpec(keys=(make_key("ann"),), max_body_bytes=2000, cors_origins=origins))
    preflight = call(app, "OPTIONS", "/v1/completions", headers={"origin": origin, **PREFLIGHT})
    assert (preflight.status_code == 200) == (allowed_origin is not None)
    if allowed_origin:
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    headers = {"origin": origin, **bearer_header("ann")}
    answer = call(app, "POST", "/v1/completions", json=BODY, headers=headers)
    refusal = call(app, "POST", "/v1/completions", json=BODY, headers={"origin": origin})
    large_body = call(app, "POST", "/v1/completions", json={"prompt": "z" * 3000}, headers=headers)
    assert [r.status_code for r in (answer, refusal, large_body)] == [200, 401, 413]
    for response in (preflight, answer, refusal, large_body):
        assert response.headers.get("access-control-allow-origin") == allowed_origin
        assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("origin", ["https://a.com/", "a.com", "https://", "null", "https://a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(ValidationError, match="cors_origins"):
        ServeSpec(cors_origins=(origin,))


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_authorization_scheme_is_case_insensitive(app, scheme):
    headers = {"authorization": f"{scheme} secret of ann"}
    assert call(app, "GET", "/v1/models", headers=headers).status_code == 200


def test_another_key_of_a_client_shares_its_rate_limits(answerer, monkeypatch):
    """Two keys of a client count against the same limits, so that it can change keys while both are valid."""
    monkeypatch.setenv("MHMOE_API_KEYS", "bob:another,new:one")
    spec = with_environment_keys(ServeSpec(keys=(make_key("bob", requests_per_minute=2),)))
    assert [(key_spec.name, key_spec.requests_per_minute) for key_spec in spec.keys] == [
        ("bob", 2),
        ("bob", 2),
        ("new", None),
    ]
    app = create_app(answerer, "tiny", spec)
    keys = ["secret of bob", "another", "another", "secret of bob", "one"]
    responses = [
        call(app, "POST", "/v1/completions", json=BODY, headers={"authorization": f"Bearer {k}"}) for k in keys
    ]
    assert [response.status_code for response in responses] == [200, 200, 429, 429, 200]


def test_keys_of_one_client_must_have_equal_limits(monkeypatch):
    monkeypatch.delenv("MHMOE_API_KEYS", raising=False)
    first_key, second_key = (
        make_key("bob", requests_per_minute=2),
        KeySpec(name="bob", sha256="0" * 64, requests_per_minute=2),
    )
    assert with_environment_keys(ServeSpec(keys=(first_key, second_key))).keys == (first_key, second_key)
    unlimited_key = second_key.model_copy(update={"requests_per_minute": None})
    with pytest.raises(SpecError, match=r"serve\.keys, bob: two keys of this name have different limits"):
        with_environment_keys(ServeSpec(keys=(first_key, unlimited_key)))


def test_rate_limited_client_gets_retry_after_and_others_continue(app):
    codes = [
        call(app, "POST", "/v1/completions", json=BODY, headers=bearer_header("bob")).status_code for _ in range(3)
    ]
    assert codes == [200, 200, 429]
    response = call(app, "POST", "/v1/completions", json=BODY, headers=bearer_header("bob"))
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(response.headers["retry-after"]) <= 31
    assert call(app, "POST", "/v1/completions", json=BODY, headers=bearer_header("ann")).status_code == 200


def test_tokens_of_streamed_answers_count_against_the_rate_limit(app):
    first_response = call(app, "POST", "/v1/completions", json={**BODY, "stream": True}, headers=bearer_header("eve"))
    assert first_response.text.endswith("[DONE]\n\n")
    second_response = call(app, "POST", "/v1/completions", json={**BODY, "stream": True}, headers=bearer_header("eve"))
    assert (first_response.status_code, second_response.status_code) == (200, 429)
    assert "all its tokens" in second_response.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_body_is_refused(app, chunked):
    body = json.dumps({"prompt": "z" * 3000}).encode()

    async def body_parts():
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    headers = {"content-type": "application/json", **bearer_header("ann")}
    response = call(app, "POST", "/v1/completions", content=body_parts() if chunked else body, headers=headers)
    assert response.status_code == 413
    error = response.json()["error"]
    assert error["code"] == "request_too_large"
    assert error["message"].endswith("send a smaller one, or raise serve.max_body_bytes")


class Gate:
    """An application whose answers wait until the test lets them go on."""

    def __init__(self):
        self.sizes, self.ends, self.is_broken = [], [], False

    async def __call__(self, scope, receive, send):
        size, more_body = 0, True
        while more_body:
            message = await receive()
            size, more_body = size + len(message.get("body", b"")), message.get("more_body")
        self.sizes.append(size)
        self.ends.append(asyncio.Event())
        await self.ends[-1].wait()
        if self.is_broken:
            raise RuntimeError("broken")
        await PlainTextResponse("done")(scope, receive, send)

    async def wait_for(self, count):
        async with asyncio.timeout(10):
            while len(self.ends) < count:
                await asyncio.sleep(0)


def limited_client(gate, *keys, address="1.1.1.1", **changes):
    """Return a client of an application that accepts at most 6 bytes in a body, and 10 in all unanswered requests."""
    access = AccessControl(keys, LocalRateLimiter(keys))
    limits = BodyLimits(gate, access, **{"max_bytes": 6, "max_held_bytes": 10, **changes})
    transport = httpx.ASGITransport(limits, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


async def single_bytes(body):
    for byte in body:
        yield bytes([byte])


@pytest.mark.parametrize("is_broken", [False, True])
def test_bodies_of_unanswered_requests_are_bounded(is_broken):
    async def ask():
        gate = Gate()
        async with limited_client(gate) as client:
            unanswered = [asyncio.create_task(client.post("/", content=b"x" * size)) for size in (6, 4)]
            await gate.wait_for(2)
            refused_responses = [await client.post("/", content=content) for content in (b"x", single_bytes(b"xx"))]
            empty_request = asyncio.create_task(client.get("/"))
            await gate.wait_for(3)
            gate.is_broken = is_broken
            gate.ends[1].set()
            await asyncio.gather(unanswered[1], return_exceptions=True)
            gate.is_broken = False
            last_request = asyncio.create_task(client.post("/", content=single_bytes(b"xxxx")))
            await gate.wait_for(4)
            for end in gate.ends:
                end.set()
            responses = await asyncio.gather(unanswered[0], empty_request, last_request)
        return gate.sizes, refused_responses, [response.status_code for response in responses]

    sizes, refused_responses, codes = asyncio.run(ask())
    for response in refused_responses:
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "busy"
    assert (codes, sizes) == ([200] * 3, [6, 4, 0, 4])


def test_a_body_that_does_not_arrive_holds_no_memory(monkeypatch):
    monkeypatch.setattr("mhmoe_ray.serving.api.access.BODY_SECONDS", 0.2)

    async def ask():
        gate, end = Gate(), asyncio.Event()

        async def unfinished_body():
            yield b"xxxxxx"
            await end.wait()

        async with limited_client(gate, max_held_bytes=6) as client:
            late_request = asyncio.create_task(client.post("/", content=unfinished_body()))
            late_response = await late_request
            next_request = asyncio.create_task(client.post("/", content=b"xxxxxx"))
            await gate.wait_for(1)
            gate.ends[0].set()
            return late_response.status_code, (await next_request).status_code

    assert asyncio.run(ask()) == (408, 200)


def test_bodies_of_strangers_are_not_read():
    async def ask():
        gate = Gate()
        async with limited_client(gate, make_key("ann")) as client:

            async def unread_body():
                raise AssertionError
                yield b""

            stranger = asyncio.create_task(client.post("/", content=unread_body()))
            await gate.wait_for(1)
            gate.ends[0].set()
            await stranger
            ann = asyncio.create_task(client.post("/", content=b"xxxx", headers=bearer_header("ann")))
            await gate.wait_for(2)
            gate.ends[1].set()
            await ann
        return gate.sizes

    assert asyncio.run(ask()) == [0, 4]


@pytest.mark.parametrize("has_keys", [True, False])
def test_one_client_has_a_share_of_slow_bodies_and_unfinished_bytes(monkeypatch, has_keys):
    """The address of a client stands for its key if the server has no keys."""
    monkeypatch.setattr("mhmoe_ray.serving.api.access.SLOW_SECONDS", 0.05)
    monkeypatch.setattr("mhmoe_ray.serving.api.access.SLOW_BODIES", 2)
    keys = [make_key("ann"), make_key("bob")] if has_keys else []

    async def ask():
        gate, end = Gate(), asyncio.Event()
        clients = [limited_client(gate, *keys, max_held_bytes=40)]
        # The second client sends its requests to the same server from another address.
        second_transport = httpx.ASGITransport(clients[0]._transport.app, client=("2.2.2.2", 1))
        clients.append(httpx.AsyncClient(transport=second_transport, base_url="http://server"))
        if has_keys:
            clients[1] = clients[0]

        async def unfinished_body(size):
            yield b"x" * size
            await end.wait()

        def send(index, content):
            headers = bearer_header(("ann", "bob")[index])
            return asyncio.create_task(clients[index].post("/", content=content, headers=headers))

        slow_requests = [send(0, unfinished_body(size)) for size in (5, 1)]
        await asyncio.sleep(0.2)
        third_response = await send(0, unfinished_body(1))
        large_response = await send(0, unfinished_body(5))
        other_request = send(1, b"xxxxxx")
        await gate.wait_for(1)
        end.set()
        await gate.wait_for(3)
        # The share is free again.
        last_request = send(0, b"xxxxxx")
        await gate.wait_for(4)
        for gate_end in gate.ends:
            gate_end.set()
        await asyncio.gather(*slow_requests, other_request, last_request)
        return [r.json()["error"]["message"] for r in (third_response, large_response)], sorted(gate.sizes)

    messages, sizes = asyncio.run(ask())
    assert "2 other bodies of this client are slow to arrive" in messages[0]
    assert "unfinished requests of this client have 6 bytes" in messages[1]
    assert sizes == [1, 5, 6, 6]


@pytest.mark.parametrize("stream", [False, True])
def test_slow_answer_times_out(answerer, stream):
    app = create_app(answerer, "tiny", ServeSpec(request_timeout=1e-6))
    response = call(app, "POST", "/v1/completions", json={**BODY, "max_tokens": SEQ_LEN - 8, "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "timeout"


@pytest.mark.long
def test_silent_rate_limiter_delays_only_clients_with_limits(answerer):
    """Requests of clients with limits time out if the rate limiter does not answer; other clients get their answers."""
    clients = []

    # The class stands for a cluster's rate limiter, which is silent while its actor is restarted.
    class SilentRateLimiter:
        async def begin_request(self, client):
            clients.append(client)
            await asyncio.sleep(30)

        def record_tokens(self, client, tokens):
            clients.append(client)

    keys = (make_key("ann"), make_key("bob", requests_per_minute=2))
    app = create_app(answerer, "tiny", ServeSpec(request_timeout=5, keys=keys), rate_limiter=SilentRateLimiter())
    limited_response, unlimited_response = (
        call(app, "POST", "/v1/completions", json=BODY, headers=bearer_header(name)) for name in ("bob", "ann")
    )
    assert (limited_response.status_code, limited_response.json()["error"]["code"]) == (503, "timeout")
    assert limited_response.json()["error"]["message"] == "there was no answer within 5 s; ask for less, or later"
    assert (unlimited_response.status_code, clients) == (200, ["bob"])


@pytest.mark.parametrize("stream", [False, True])
def test_request_beyond_the_queue_gets_429_and_uses_no_tokens(tokenizer, stream):
    spec = ServeSpec(max_concurrency=1, max_waiting=1, max_tokens=4000, keys=(make_key("eve", tokens_per_minute=1),))
    answerer = create_answerer(build_model(), tokenizer, 4096, spec)
    app = create_app(answerer, "tiny", spec)
    body = {**BODY, "n": 2, "max_tokens": 3000, "stream": stream}

    async def send_two_requests():
        """Send two requests, one after the other, while the engine is busy, and return the responses."""
        running_answer = answerer.answer(Request((1,), SamplingParams(max_tokens=4000, temperature=0)))
        await anext(running_answer)
        transport = httpx.ASGITransport(app)
        async with aclosing(running_answer), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.post("/v1/completions", json=body, headers=bearer_header("eve")) for _ in range(2)]

    responses = asyncio.run(send_two_requests())
    answerer.engine.close()
    for response in responses:
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "busy"


def test_more_choices_than_the_server_holds_are_refused_with_400(answerer):
    app = create_app(answerer, "tiny", ServeSpec(max_concurrency=1, max_waiting=1))
    response = call(app, "POST", "/v1/completions", json={**BODY, "n": 3})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "3 choices are more than the 2 that this server takes at a time"


def test_metrics_report_the_engines_counts(answerer):
    app = create_app(answerer, "tiny", ServeSpec(), replica="r1")
    initial_stats = answerer.engine.stats()
    call(app, "POST", "/v1/completions", json=BODY)
    text = call(app, "GET", "/metrics").text
    labels = '{model="tiny",replica="r1"}'
    assert f"mhmoe_answer_tokens_total{labels} {initial_stats.answer_tokens + 8:.1f}" in text
    assert f"mhmoe_first_token_seconds_count{labels} {initial_stats.first_token.count + 1:.1f}" in text
    assert f"mhmoe_running{labels} 0.0" in text
    assert 'mhmoe_expert_routes_total{expert="3",layer="0",model="tiny",replica="r1"}' in text
