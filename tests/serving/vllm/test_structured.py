"""Tests of tools and structured answers with vLLM, through the clients that applications use."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.serving.asking import call
from tests.serving.conftest import build_model, build_tokenizer, save_checkpoint, serve_app
from tests.serving.vllm.conftest import SPEC, serve_with_vllm

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}a:"
)
OPTIONS = {
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "tool_call_parser": "hermes",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "size", "count", "tags"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "order", "description": "Order a coat.", "parameters": SCHEMA}}
HELLO = [{"role": "user", "content": "the quick fox"}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "coat", "schema": SCHEMA}}
CALL_PATTERN = r'<tool_call>\{"name": "order", "arguments": \{"count": [1-9]\}\}</tool_call>'
MAX_TOKENS = 300


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    run = tmp_path_factory.mktemp("tools-abc123")
    build_tokenizer().save(str(run / "tokenizer.json"))
    RunDir(run).chat_template_file.write_text(TEMPLATE)
    with serve_with_vllm(save_checkpoint(run, 1, build_model(SPEC), seq_len=2048), vllm=OPTIONS) as answerer:
        yield answerer


@pytest.fixture(scope="module")
def app(answerer):
    return create_app(answerer, "tiny", ServeSpec(engine="vllm", max_tokens=MAX_TOKENS))


@pytest.fixture(scope="module")
def url(app):
    with serve_app(app) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0)


def check_coat(coat):
    assert list(coat) == SCHEMA["required"]
    assert coat["size"] in ("small", "large")
    assert 0 <= coat["count"] <= 999


def test_all_answers_to_a_schema_parse(client):
    def ask(seed):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, temperature=1, seed=seed, response_format=FORMAT
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(ask, range(200)))
    for text in texts:
        check_coat(json.loads(text))
    assert len(set(texts)) > 150


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "order"}}])
def test_required_tools_are_called(client, choice):
    fields = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "tool_choice": choice, "seed": 3}
    answer = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
    [tool_call] = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content, tool_call.function.name) == ("tool_calls", None, "order")
    check_coat(json.loads(tool_call.function.arguments))
    *_, last_chunk = client.chat.completions.create(**fields, parallel_tool_calls=False, stream=True)
    assert last_chunk.choices[0].delta.tool_calls[0].function.arguments == tool_call.function.arguments
    # The result of the call goes back to the model.
    result = {"role": "tool", "tool_call_id": tool_call.id, "content": "done"}
    history = [*HELLO, answer.message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(model="tiny", messages=history, max_tokens=3).choices[0].message.content


def test_parser_finds_calls_in_free_answers(client):
    fields = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "max_tokens": MAX_TOKENS}
    extra = {"structured_outputs": {"regex": f"yes {CALL_PATTERN}"}}
    answer = client.chat.completions.create(**fields, extra_body=extra).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", "yes ")
    assert json.loads(answer.message.tool_calls[0].function.arguments)["count"] in range(1, 10)
    plain = client.chat.completions.create(**fields, extra_body={"structured_outputs": {"choice": ["no"]}}).choices[0]
    assert (plain.finish_reason, plain.message.content, plain.message.tool_calls) == ("stop", "no", None)


def format_of(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def nested(depth):
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "null"}


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (format_of({"type": "nothing"}), "response_format", "json"),
        (format_of({"$ref": "#/$defs/none"}), "response_format", "json"),
        (format_of({"enum": [f"value {i}" for i in range(10_000)]}), "response_format", "at most 65,536 fit"),
        (format_of(nested(200)), "response_format", "nested too deeply"),
        (format_of({"type": "string", "pattern": "(("}), "response_format", "json"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice"),
        ({"tools": [{"type": "web_search"}]}, "tools", "not supported"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
        ({"tool_choice": "required"}, "tool_choice", "needs 'tools'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tool"),
        ({"response_format": FORMAT, "ignore_eos": True}, "ignore_eos", "where an answer ends"),
    ],
)
def test_wrong_structure_is_a_400(app, fields, param, reason):
    answer = call(app, "POST", "/v1/chat/completions", json={"messages": HELLO, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert reason in answer.json()["error"]["message"]
    assert call(app, "GET", "/ready").status_code == 200


def test_template_without_a_place_for_tools_is_a_400(answerer, app, monkeypatch):
    monkeypatch.setattr(answerer, "template", type(answerer.template)("{{ messages[0].content }}", "", ""))
    answer = call(app, "POST", "/v1/chat/completions", json={"messages": HELLO, "tools": [TOOL]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert "no place for tools" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_prefix_cachin": False}, "did you mean 'enable_prefix_caching'"),
        ({"tool_call_parser": "herms"}, "did you mean 'hermes'"),
        ({"dtype": "float16"}, r"serve\.precision"),
    ],
)
def test_unknown_or_owned_option_is_refused_in_one_line(run_dir, options, reason):
    checkpoint = save_checkpoint(run_dir, 400 + len(reason), build_model(SPEC))
    with pytest.raises(ServeError, match=rf"^serve\.vllm\.{next(iter(options))}: .*{reason}"):
        load_answerer(checkpoint, ServeSpec(engine="vllm", vllm=options))


def test_langchain_calls_tools_and_returns_structures(url):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(base_url=url, api_key="any", model="tiny", temperature=1)
    [tool_call] = chat.bind_tools([TOOL], tool_choice="order").invoke("the fox").tool_calls
    check_coat(tool_call["args"])
    for method in ("json_schema", "function_calling"):
        schema = {"title": "coat", "description": "A coat.", **SCHEMA}
        check_coat(chat.with_structured_output(schema, method=method).invoke("the fox"))


def test_litellm_calls_tools_and_returns_structures(url):
    litellm = pytest.importorskip("litellm")
    fields = {"model": "hosted_vllm/tiny", "api_base": url, "messages": HELLO, "max_tokens": MAX_TOKENS}
    answer = litellm.completion(**fields, tools=[TOOL], tool_choice="required").choices[0]
    check_coat(json.loads(answer.message.tool_calls[0].function.arguments))
    check_coat(json.loads(litellm.completion(**fields, response_format=FORMAT).choices[0].message.content))


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor_returns_objects(client, mode):
    instructor, pydantic = pytest.importorskip("instructor"), pytest.importorskip("pydantic")

    class Coat(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        is_warm: bool

    coat = instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions.create(
        model="tiny", messages=HELLO, response_model=Coat, max_retries=0
    )
    assert isinstance(coat.is_warm, bool)
