"""Tests of completions: through OpenAI's own client, over a real connection, and of their number of tokens."""

import hashlib
import json
import shlex

import openai
import pytest
import torch

from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.decoder import DecoderServing
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.serving.asking import call
from tests.serving.conftest import SEQ_LEN, SPEC, build_model, serve_app

KEY = "a key of ours"


@pytest.fixture(scope="module")
def client(answerer):
    keys = (KeySpec(name="ann", sha256=hashlib.sha256(KEY.encode()).hexdigest()),)
    with serve_app(create_app(answerer, "tiny", ServeSpec(keys=keys))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def test_completion_accepts_all_supported_fields(client):
    completion = client.completions.create(
        model="tiny",
        prompt=["the quick", "ein Jäger"],
        max_tokens=8,
        temperature=0.8,
        top_p=0.9,
        n=2,
        seed=5,
        logprobs=2,
        echo=True,
        stop=["zz"],
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"5": 1},
        user="somebody",
        extra_body={"top_k": 40, "min_p": 0.01},
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[0].text.startswith("the quick")
    assert completion.choices[2].text.startswith("ein Jäger")
    assert completion.usage.completion_tokens == 4 * 8
    assert len(completion.choices[0].logprobs.tokens) == len(completion.choices[0].logprobs.token_logprobs)


@pytest.mark.parametrize(("limit", "tokens"), [(5, 5), (40, 16)])
def test_default_number_of_tokens_respects_the_limit_of_the_server(answerer, limit, tokens):
    app = create_app(answerer, "tiny", ServeSpec(max_tokens=limit))
    # The end token is forbidden, because it may end an answer early.
    body = {"prompt": "the quick", "logit_bias": {"0": -100}}
    response = call(app, "POST", "/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == tokens
    refusal = call(app, "POST", "/v1/completions", json={**body, "max_tokens": limit + 1})
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "max_tokens")
    assert call(app, "POST", "/v1/completions", json={**body, "max_tokens": 0}).status_code == 200


def test_printed_command_respects_the_limit_of_the_server(answerer, run_dir):
    words = shlex.split(DecoderServing().request_example(SPEC, RunDir(run_dir), "").command)
    body = json.loads(words[words.index("-d") + 1])
    assert call(create_app(answerer, "tiny", ServeSpec(max_tokens=1)), "POST", words[1], json=body).status_code == 200


def test_streamed_chunks_join_to_the_complete_answer(client):
    request = {"model": "tiny", "prompt": "the quick", "max_tokens": 12, "temperature": 1.2, "seed": 3, "logprobs": 1}
    completion = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    *text_chunks, usage_chunk = chunks
    assert "".join(chunk.choices[0].text for chunk in text_chunks) == completion.choices[0].text
    assert [lp for chunk in text_chunks for lp in chunk.choices[0].logprobs.token_logprobs] == (
        completion.choices[0].logprobs.token_logprobs
    )
    assert (usage_chunk.choices, usage_chunk.usage) == ([], completion.usage)


@torch.inference_mode()
def test_prompt_logprobs_equal_those_of_the_model(client, answerer):
    ids = answerer.encode("the quick brown fox")
    completion = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    logprob_TV = build_model()(torch.tensor([ids])).logits_BTV[0, :, :300].log_softmax(-1)
    expected = [float(logprob_TV[i, token]) for i, token in enumerate(ids[1:])]
    first_logprob, *logprobs = completion.choices[0].logprobs.token_logprobs
    assert first_logprob is None
    assert logprobs == pytest.approx(expected, abs=1e-3)


def test_models_are_listed(client):
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_errors_are_exceptions_of_the_client(client):
    request = {"model": "tiny", "prompt": "the"}
    with pytest.raises(openai.BadRequestError) as field_error:
        client.completions.create(**request, best_of=3)
    assert (field_error.value.code, field_error.value.param) == ("unsupported_parameter", "best_of")
    with pytest.raises(openai.BadRequestError) as length_error:
        client.completions.create(**{**request, "prompt": "z" * SEQ_LEN})
    assert length_error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**request, "model": "gpt"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
