"""Tests of the routes without Ray: answers, errors, and clients that disconnect."""

import asyncio
import gc
import json
import re
import threading

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import mhmoe_ray
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.data.chat.template import ChatTemplate
from mhmoe_ray.serving.answer import Answerer, ScoredText
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.api.completions import _top_logprobs
from mhmoe_ray.serving.api.schema import MAX_CHOICES
from mhmoe_ray.spec import ServeSpec
from tests.serving.asking import call
from tests.serving.conftest import SEQ_LEN, TEXT, build_model, build_tokenizer
from tests.serving.own import create_answerer
from tests.support.llama_tokenizer import llama_tokenizer


@pytest.fixture
def app(answerer):
    return create_app(answerer, "tiny", ServeSpec(max_tokens=40))


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"best_of": 3}, "best_of", "unsupported_parameter", "'best_of' is not supported"),
        ({"suffix": "a", "temperature": -1}, "suffix", "unsupported_parameter", "not supported"),
        ({"logprobs": 21}, "logprobs", None, "less than or equal to 20"),
        ({"logit_bias": {"one": 2}}, "logit_bias", None, "should match pattern"),
        ({"logit_bias": {"300": 1}}, "logit_bias", None, "there is no token 300; there are 300"),
        ({"logit_bias": {"1": 101}}, "logit_bias", None, "less than or equal to 100"),
        ({"n": 0}, "n", None, "greater than or equal to 1"),
        ({"prompt": ["a", "b"], "n": MAX_CHOICES}, "n", None, f"are more than {MAX_CHOICES} choices"),
        (
            {"tools": [{"type": "function"}], "tool_choice": "required"},
            "tools",
            "unsupported_parameter",
            "'tools' is not",
        ),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "unsupported_parameter", "'tool_choice' is not"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "not supported"),
        (
            {"response_format": {"json_schema": {}, "type": "json_schema"}},
            "response_format",
            "unsupported_parameter",
            "",
        ),
        ({"response_format": {}}, "response_format", "unsupported_parameter", "'response_format' is not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter", "'modalities' is not supported"),
        ({"service_tier": "flex"}, "service_tier", "unsupported_parameter", "'service_tier' is not supported"),
        ({"store": True}, "store", "unsupported_parameter", "'store' is not supported"),
        ({"user": 1}, "user", None, "'user': Input should be a valid string"),
        ({"metadata": 1}, "metadata", None, "'metadata': Input should be a valid dictionary"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", None, "valid boolean"),
        ({"repetition_penalty": 0}, "repetition_penalty", None, "greater than or equal to 0.01"),
        ({"min_tokens": 17}, "min_tokens", None, "min_tokens is 17, more than max_tokens, 16"),
        ({"temperature": 2.5}, "temperature", None, "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", None, "valid number"),
        ({"top_p": 0}, "top_p", None, "greater than 0"),
        ({"max_tokens": -1}, "max_tokens", None, "greater than or equal to 0"),
        ({"max_tokens": 41}, "max_tokens", None, "max_tokens is 41, and this server allows at most 40"),
        ({"seed": 2**64}, "seed", None, "less than"),
        ({"top_k": 1e30}, "top_k", None, "less than 2147483648"),
        ({"prompt": []}, "prompt", None, "at least 1 item"),
        ({"prompt": [[]]}, "prompt", None, "'prompt': "),
        ({"prompt": [1, "a"]}, "prompt", None, "valid"),
        ({"prompt": [3, 300]}, "prompt", None, "there is no token 300; there are 300"),
        ({"prompt": "\ud800"}, "prompt", None, "surrogates not allowed"),
        ({"prompt": None}, "prompt", None, "required"),
        ({"stop": ""}, "stop", None, "at least 1 character"),
        ({"stop": list("abcde")}, "stop", None, "at most 4 items"),
        ({"prompt": "z" * SEQ_LEN}, "prompt", "context_length_exceeded", f"may have {SEQ_LEN}"),
    ],
)
def test_wrong_field_is_named_in_the_error(app, fields, param, code, message):
    # The body is ASCII, so that a lone surrogate reaches the server as an escape.
    body = json.dumps({"prompt": "the", **fields})
    response = call(app, "POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert message in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"service_tier": "auto", "store": False, "metadata": {"team": "a"}},
        {"service_tier": "default", "user": "ann", "safety_identifier": "b", "prompt_cache_key": "c"},
        {"n": 1, "best_of": 1, "min_tokens": 0, "repetition_penalty": 1, "ignore_eos": False},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_fields_that_change_nothing_are_accepted(app, fields):
    assert completion(app, **fields)["choices"] == completion(app)["choices"]


def test_penalty_and_limits_of_end_tokens_change_the_answer(app):
    """The first token of every answer would be the end token because of its bias."""
    likely_end = {"logit_bias": {"0": 100}, "logprobs": 0, "max_tokens": 6}
    answers = [completion(app, **likely_end, **fields) for fields in ({}, {"min_tokens": 4}, {"ignore_eos": True})]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [0, 4, 6]
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["stop", "stop", "length"]
    assert (answers[1]["choices"][0]["text"] != "", answers[2]["choices"][0]["text"]) == (True, "")
    assert completion(app, repetition_penalty=3)["choices"] != completion(app)["choices"]


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "message"),
    [
        ("POST", "/v1/completions", {"content": "{"}, 400, "not JSON"),
        ("POST", "/v1/completions", {"json": [1]}, 400, "the body"),
        ("POST", "/v1/completions", {}, 400, "the body"),
        ("POST", "/v1/completions", {"json": {}}, 400, "'prompt': Field required"),
        ("POST", "/v1/completions", {"json": {"prompt": "a", "model": "gpt"}}, 404, "this server has 'tiny'"),
        ("POST", "/v1/chat", {"json": {}}, 404, "/v1/chat: Not Found"),
        ("GET", "/v1/completions", {}, 405, "Method Not Allowed"),
        ("GET", "/redoc", {}, 404, "/redoc: Not Found"),
        ("OPTIONS", "/v1/models", {"headers": {"origin": "https://a.com"}}, 405, "Method Not Allowed"),
    ],
)
def test_wrong_requests_get_an_openai_error_body(app, method, path, request_, status, message):
    if "content" in request_:
        request_ = {**request_, "headers": {"content-type": "application/json"}}
    response = call(app, method, path, **request_)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
def test_body_without_json_content_type_is_explained(app, headers):
    """The error names the missing header, which `curl -d` does not send by itself."""
    response = call(app, "POST", "/v1/completions", content='{"prompt": "the"}', headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith("; send Content-Type: application/json")


LONG = "the quick brown fox " * 60_000


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {"prompt": LONG}, 200),
        ("/v1/completions", {"prompt": LONG}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, 400),
    ],
    ids=["text", "prompt", "messages"],
)
def test_server_stays_responsive_while_a_long_prompt_is_encoded(answerer, monkeypatch, path, body, status):
    template = ChatTemplate("{{ messages[0].content }}", "", "")
    spec = ServeSpec(max_body_bytes=10_000_000)
    app = create_app(Answerer(answerer.engine, answerer.tokenizer, template, answerer.details), "tiny", spec)
    is_encoding, may_encode = threading.Event(), threading.Event()

    def with_wait(encode):
        def wait_and_encode(*args):
            is_encoding.set()
            assert may_encode.wait(60)
            return encode(*args)

        return wait_and_encode

    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(Answerer, name, with_wait(getattr(Answerer, name)))

    async def ask_both():
        """Return the responses to the long prompt, and to a request that is sent while that prompt is encoded."""
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
            request = asyncio.create_task(client.post(path, json=body))
            assert await asyncio.to_thread(is_encoding.wait, 60)
            health = await client.get("/health")
            assert not request.done()
            may_encode.set()
            return await request, health

    response, health = asyncio.run(asyncio.wait_for(ask_both(), 60))
    assert (response.status_code, health.status_code) == (status, 200)


def completion(app, **body):
    """Return the body of a successful response to a completion, greedy by default."""
    response = call(app, "POST", "/v1/completions", json={"prompt": "the quick", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_prompts_and_choices_are_answered_in_order(app):
    texts = ["the quick", "ein Jäger"]
    single_texts = [completion(app, prompt=text)["choices"][0]["text"] for text in texts]
    response = completion(app, prompt=texts, n=2)
    assert [c["index"] for c in response["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in response["choices"]] == [
        single_texts[0],
        single_texts[0],
        single_texts[1],
        single_texts[1],
    ]
    assert response["usage"]["completion_tokens"] == 4 * 16
    choices = completion(app, temperature=1.5, seed=3, n=4)["choices"]
    assert len({c["text"] for c in choices}) == 4
    assert choices == completion(app, temperature=1.5, seed=3, n=4)["choices"]


@pytest.mark.parametrize("usage", [False, True])
def test_responses_and_the_last_event_name_the_weights(app, checkpoint, usage):
    body = {"prompt": "the", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": usage}, "n": 2}
    response = call(app, "POST", "/v1/completions", json=body)
    names = {"x-mhmoe-run": checkpoint.parents[1].name, "x-mhmoe-step": "1"}
    names["x-mhmoe-digest"] = read_manifest(checkpoint).weights_sha256
    assert names.items() <= dict(response.headers).items()
    *chunks, last_chunk = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    assert {name: last_chunk.get(name) for name in names} == names
    assert not any(names.keys() & chunk.keys() for chunk in chunks)
    assert names.items() <= dict(call(app, "POST", "/v1/completions", json={}).headers).items()


def test_prompt_of_token_ids_is_used_unchanged(app, answerer):
    ids = answerer.encode("the quick")
    assert completion(app, prompt=ids)["choices"] == completion(app)["choices"]
    assert completion(app, prompt=[ids, ids[1:]])["usage"]["prompt_tokens"] == 2 * len(ids) - 1
    assert completion(app, prompt=ids[1:], echo=True)["choices"][0]["text"].startswith("the quick")


def test_logprobs_have_texts_and_offsets_of_their_tokens(app, answerer):
    text = "der älteste 日本 🦊"
    choice = completion(app, prompt=text, logprobs=2, echo=True, max_tokens=4)["choices"][0]
    logprobs, tokens = choice["logprobs"], choice["logprobs"]["tokens"]
    count = len(answerer.encode(text)) - 1  # without the start token, which has no text
    assert len(tokens) == count + 4
    assert {len(values) for values in logprobs.values()} == {count + 4}
    assert all(lp < 0 for lp in logprobs["token_logprobs"])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    for token, offset in zip(tokens, logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    scored_choice = completion(app, prompt=text, logprobs=2, echo=True, max_tokens=0)["choices"][0]
    assert scored_choice["text"] == text
    assert scored_choice["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:count]
    assert scored_choice["finish_reason"] == "length"
    assert completion(app, max_tokens=0)["choices"][0]["text"] == ""
    choice_of_ids = completion(app, prompt=answerer.encode(text), logprobs=0, echo=True, max_tokens=0)["choices"][0]
    assert choice_of_ids["logprobs"]["tokens"] == ["<|endoftext|>", *tokens[:count]]
    assert choice_of_ids["logprobs"]["token_logprobs"] == [None, *logprobs["token_logprobs"][:count]]
    assert choice_of_ids["logprobs"]["top_logprobs"][:2] == [None, {}]
    assert choice_of_ids["logprobs"]["text_offset"] == [0, *logprobs["text_offset"][:count]]


def test_text_offsets_allow_for_a_dropped_leading_space():
    """Text offsets are right with decoders like LLaMA's, which drop the space at the start of a text.

    An answer keeps its first space after a prompt.
    """
    tokenizer = llama_tokenizer(TEXT[:2] * 4, 300)
    answerer = create_answerer(build_model(), tokenizer, SEQ_LEN, ServeSpec())
    app = create_app(answerer, "tiny", ServeSpec())
    the = tokenizer.token_to_id("▁the")
    fields = {"logprobs": 0, "max_tokens": 2, "logit_bias": {str(the): 100}}
    echoed_choice, unprompted_choice, prompted_choice = (
        completion(app, **fields, **prompt_fields)["choices"][0]
        for prompt_fields in ({"prompt": "the brown fox", "echo": True}, {"prompt": ""}, {"prompt": "the"})
    )
    answerer.engine.close()
    assert (echoed_choice["text"], unprompted_choice["text"], prompted_choice["text"]) == (
        "the brown fox the the",
        "the the",
        " the the",
    )
    assert unprompted_choice["logprobs"]["text_offset"] == [0, 3]
    assert prompted_choice["logprobs"]["text_offset"] == [0, 4]
    for token, offset in zip(
        echoed_choice["logprobs"]["tokens"][1:], echoed_choice["logprobs"]["text_offset"][1:], strict=True
    ):
        assert echoed_choice["text"][offset:].startswith(token)
    assert echoed_choice["logprobs"]["text_offset"][0] == 0


def test_token_ids_may_have_gaps():
    """A request and an answer may have the token with the largest id, which exceeds the number of tokens."""
    content = json.loads(build_tokenizer().to_str())
    last_token = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last_token] = 310
    answerer = create_answerer(build_model(), Tokenizer.from_str(json.dumps(content)), SEQ_LEN, ServeSpec())
    app = create_app(answerer, "tiny", ServeSpec())
    choice = completion(app, prompt=[310], logit_bias={"310": 100}, max_tokens=1, echo=True)["choices"][0]
    response = call(app, "POST", "/v1/completions", json={"prompt": [311]})
    answerer.engine.close()
    assert choice["text"] == 2 * answerer.decode([310]) != ""
    assert "there is no token 311" in response.text


def test_token_that_looks_like_a_bytes_marker_is_ordinary_text():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["bytes:fo", "bytes:e6"])
    answerer = create_answerer(build_model(), tokenizer, SEQ_LEN, ServeSpec())
    app = create_app(answerer, "tiny", ServeSpec())
    fields = {"prompt": "a bytes:fo bytes:e6 z", "logprobs": 0, "echo": True, "max_tokens": 0}
    logprobs = completion(app, **fields)["choices"][0]["logprobs"]
    answerer.engine.close()
    assert logprobs["tokens"] == ["a", " ", "bytes:fo", " ", "bytes:e6", " ", "z"]
    assert logprobs["text_offset"] == [0, 1, 2, 10, 11, 19, 20]


def test_detokenize_inverts_tokenize(app, answerer):
    result = call(app, "POST", "/tokenize", json={"prompt": "ein Jäger"}).json()
    assert result == {"tokens": answerer.encode("ein Jäger"), "count": len(result["tokens"]), "max_model_len": SEQ_LEN}
    bare_result = call(app, "POST", "/tokenize", json={"prompt": "ein Jäger", "add_special_tokens": False}).json()
    assert bare_result["tokens"] == result["tokens"][1:]
    assert call(app, "POST", "/detokenize", json={"tokens": bare_result["tokens"]}).json() == {"prompt": "ein Jäger"}


def test_model_without_a_start_token_scores_and_tokenizes_whole_prompts():
    """Some imported models read texts without a start token."""
    answerer = create_answerer(build_model(), build_tokenizer(), SEQ_LEN, ServeSpec(), adds_start=False)
    app = create_app(answerer, "tiny", ServeSpec())
    ids = answerer.encode("the quick")
    for bare in (True, False):
        body = {"prompt": "the quick", "add_special_tokens": not bare}
        assert call(app, "POST", "/tokenize", json=body).json()["tokens"] == ids
    fields = {"logprobs": 0, "echo": True, "max_tokens": 0}
    scored_choice, choice_of_ids = (
        completion(app, prompt=prompt, **fields)["choices"][0] for prompt in ("the quick", ids)
    )
    empty_choice = completion(app, prompt="", **fields)["choices"][0]
    answerer.engine.close()
    assert scored_choice == choice_of_ids
    assert len(scored_choice["logprobs"]["tokens"]) == len(ids)
    assert scored_choice["logprobs"]["token_logprobs"][0] is None
    assert empty_choice["logprobs"] is None  # the added start token has no score


def test_api_description_lists_the_routes(app):
    paths = call(app, "GET", "/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health"} <= paths.keys()


def test_description_has_the_version_and_no_error_that_is_never_sent(app):
    description = call(app, "GET", "/openapi.json").json()
    assert description["info"]["version"] == mhmoe_ray.__version__
    answers = {status for path in description["paths"].values() for o in path.values() for status in o["responses"]}
    assert answers == {"200", "400", "401", "404", "408", "413", "429", "4XX", "503"}
    assert "HTTPValidationError" not in description["components"]["schemas"]


def test_docs_show_all_routes_and_fields_without_another_server(app):
    page = call(app, "GET", "/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "script" not in page.headers["content-security-policy"]
    assert [
        word for word in ("<script", "http:", "https:", "@import", "url(", " src=", "<link") if word in page.text
    ] == []
    description = call(app, "GET", "/openapi.json").json()
    for path in description["paths"]:
        assert path in page.text
    for name, schema in description["components"]["schemas"].items():
        [section] = re.findall(f"<h2>{name}</h2>(.*?)</table>", page.text, re.DOTALL)
        assert all(f"<td>{field}<td>" in section for field in schema.get("properties", {}))
    assert "<td>min_p<td>number maximum 1.0, minimum 0.0 or null<td>0.0<td>Draw from the tokens of" in page.text
    assert "<td>prompt<td>string or array of integer" in page.text
    assert "<td>tool_choice<td>&quot;none&quot; or &quot;auto&quot; or null<td>&quot;none&quot;<td>" in page.text


def test_null_fields_count_as_absent(app):
    body = {"prompt": ["the"], "temperature": 0}
    nulls = {"max_tokens": None, "stop": None, "logprobs": None, "n": None, "seed": None}
    plain, with_nulls = (call(app, "POST", "/v1/completions", json=b).json() for b in (body, {**body, **nulls}))
    assert with_nulls["choices"] == plain["choices"]


@pytest.fixture
def broken_app(tokenizer):
    """Yield an application whose model fails at its third step."""
    model, calls = build_model(), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a secret of the server")

    model.register_forward_hook(fail)
    answerer = create_answerer(model, tokenizer, SEQ_LEN, ServeSpec(max_concurrency=2))
    yield create_app(answerer, "tiny", ServeSpec(max_tokens=40))
    answerer.engine.close()


def test_engine_failure_hides_internals(broken_app):
    response = call(broken_app, "POST", "/v1/completions", json={"prompt": "the", "temperature": 0})
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_failure_in_mid_stream_ends_with_an_error_event(broken_app, caplog):
    body = {"prompt": "the", "temperature": 0, "logprobs": 0, "stream": True}
    response = call(broken_app, "POST", "/v1/completions", json=body)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert json.loads(events[-1])["error"]["type"] == "server_error"
    tokens = [token for event in events[:-1] for token in json.loads(event)["choices"][0]["logprobs"]["tokens"]]
    assert len(tokens) == 2, "the tokens before the failure are sent"
    assert "secret" not in response.text
    assert "a secret of the server" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_client_disconnect_ends_the_computation(tokenizer, stream):
    model, steps = build_model(), []
    fifth_step = asyncio.Event()

    answerer = create_answerer(model, tokenizer, 4096, ServeSpec(max_concurrency=2))

    async def leave_early():
        loop = asyncio.get_running_loop()

        def count(*_):
            steps.append(1)
            if len(steps) == 5:
                loop.call_soon_threadsafe(fifth_step.set)

        model.register_forward_hook(count)
        app = create_app(answerer, "tiny", ServeSpec(max_tokens=4000))
        # Greedy answers of this model are long, so the client always leaves before the end of the answer.
        body = {"prompt": "the quick", "max_tokens": 4000, "temperature": 0, "stream": stream}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            request = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.wait_for(fifth_step.wait(), timeout=60)
            # Cancel the task of the request, as Serve does when a client disconnects.
            request.cancel()
            await asyncio.wait([request])
        assert request.cancelled()
        deadline = loop.time() + 60
        while answerer.engine.stats().running:
            assert loop.time() < deadline
            await asyncio.sleep(0.01)
        assert len(steps) < 4000

    try:
        asyncio.run(leave_early())
    finally:
        answerer.engine.close()


@pytest.mark.parametrize("body_started", [False, True])
def test_client_disconnect_while_sending_ends_the_answer_at_once(tokenizer, body_started):
    """An answer is closed at once if its client disconnects while `send` waits for the client to read."""
    answerer = create_answerer(build_model(), tokenizer, 4096, ServeSpec(max_concurrency=2))
    app = create_app(answerer, "tiny", ServeSpec(max_tokens=4000))
    body = json.dumps({"prompt": "the quick", "max_tokens": 4000, "temperature": 0, "stream": True}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def disconnect():
        errors, sending = [], asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        received = [{"type": "http.request", "body": body}]

        async def receive():
            if received:
                return received.pop()
            await sending.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if not body_started or message["type"] == "http.response.body":
                sending.set()
                await asyncio.Event().wait()

        await app(scope, receive, send)
        # The application has closed the answer itself. It must not leave this to the garbage collector, which closes
        # generators in any order.
        assert all(state.is_abandoned for state in answerer.engine._all_requests())
        gc.collect()
        await asyncio.sleep(0.1)
        assert errors == []

    asyncio.run(disconnect())
    answerer.engine.close()


@settings(max_examples=15)
@given(
    temperature=st.sampled_from([0, 0.7, 1.5]),
    seed=st.integers(0, 1000),
    stop=st.lists(st.text("aeiou th", min_size=1, max_size=2), max_size=2),
    echo=st.booleans(),
)
@pytest.mark.long
def test_chunks_join_to_the_complete_answer(answerer, temperature, seed, stop, echo):
    app = create_app(answerer, "tiny", ServeSpec(max_tokens=40))
    body = {"prompt": "the", "temperature": temperature, "seed": seed, "stop": stop, "echo": echo}
    plain = call(app, "POST", "/v1/completions", json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = call(app, "POST", "/v1/completions", json={**body, **options})
    *chunks, usage_chunk, end_marker = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    chunks = [json.loads(c) for c in chunks]
    assert end_marker == "[DONE]"
    assert len({c["id"] for c in chunks}) == 1
    assert "".join(c["choices"][0]["text"] for c in chunks) == plain["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]
    assert [c["usage"] for c in chunks] == [None] * len(chunks)
    assert (json.loads(usage_chunk)["choices"], json.loads(usage_chunk)["usage"]) == ([], plain["usage"])
    assert plain["choices"][0]["text"].startswith("the") or not echo


def test_likelier_of_two_tokens_with_equal_text_is_reported():
    """If two tokens have the same text, such as a special and an ordinary one, the first and likelier is reported."""
    score = ScoredText(b"a", 1, -0.1, [(b"a", -0.1), (b"b", -2.0), (b"a", -5.0)])
    assert list(_top_logprobs(score).items()) == [("a", -0.1), ("b", -2.0)]
