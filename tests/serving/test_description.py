"""Tests with requests, allowed and forbidden, that schemathesis generates from the API's description."""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings

from mhmoe_ray.data.chat.template import ChatTemplate
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.spec import ServeSpec
from tests.serving.conftest import SEQ_LEN, build_model, build_tokenizer
from tests.serving.own import create_answerer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/stats"),
    ("GET", "/tokenizer_info"),
    ("GET", "/health"),
    ("GET", "/ready"),
]
# These endpoints may refuse requests that match the description, because some fields limit each other or depend on the
# model: max_tokens and min_tokens, n and prompts, token ids.
LIMITED = ["/v1/completions", "/v1/chat/completions"]


@pytest.fixture(scope="module")
def api_schema():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "", "")
    answerer = create_answerer(build_model(), build_tokenizer(), SEQ_LEN, ServeSpec(), template)
    app = create_app(answerer, "tiny", ServeSpec(max_tokens=40))
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    answerer.engine.close()


def test_operations_are_complete(api_schema):
    operations = {(method.upper(), path) for path in api_schema for method in api_schema[path]}
    assert operations == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (*operation, mode)
        for operation in OPERATIONS
        for mode in GenerationMode
        if operation[0] == "POST" or mode is GenerationMode.POSITIVE  # a GET has no fields that could be wrong
    ],
)
def test_responses_match_the_description(api_schema, method, path, mode):
    operation = api_schema[path][method]

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance] if path in LIMITED else [])

    check()
