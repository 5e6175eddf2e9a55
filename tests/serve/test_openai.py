"""OpenAI's own client, over a real connection."""

import hashlib

import openai
import pytest
import torch

from mhmoe_ray.serve.api.app import create_app
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.serve.conftest import SEQ_LEN, build_model, running

KEY = "a key of ours"


@pytest.fixture(scope="module")
def client(answerer):
    keys = (KeySpec(name="ann", sha256=hashlib.sha256(KEY.encode()).hexdigest()),)
    with running(create_app(answerer, "tiny", ServeSpec(keys=keys))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def test_a_completion_with_all_that_it_may_ask(client):
    found = client.completions.create(
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
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text.startswith("the quick")
    assert found.choices[2].text.startswith("ein Jäger")
    assert found.usage.completion_tokens == 4 * 8
    assert len(found.choices[0].logprobs.tokens) == len(found.choices[0].logprobs.token_logprobs)


def test_a_stream_is_the_whole_answer_in_pieces(client):
    asked = {"model": "tiny", "prompt": "the quick", "max_tokens": 12, "temperature": 1.2, "seed": 3, "logprobs": 1}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert [lp for part in parts for lp in part.choices[0].logprobs.token_logprobs] == (
        whole.choices[0].logprobs.token_logprobs
    )
    assert (last.choices, last.usage) == ([], whole.usage)


@torch.inference_mode()
def test_logprobs_of_a_prompt_are_the_models(client, answerer):
    ids = answerer.encode("the quick brown fox")
    found = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    logprob_TV = build_model()(torch.tensor([ids])).logits_BTV[0, :, :300].log_softmax(-1)
    expected = [float(logprob_TV[at, token]) for at, token in enumerate(ids[1:])]
    first, *rest = found.choices[0].logprobs.token_logprobs
    assert first is None
    assert rest == pytest.approx(expected, abs=1e-3)


def test_models_are_listed(client):
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_errors_are_those_that_the_client_knows(client):
    asked = {"model": "tiny", "prompt": "the"}
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(**asked, best_of=3)
    assert (wrong.value.code, wrong.value.param) == ("unsupported_parameter", "best_of")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(**{**asked, "prompt": "z" * SEQ_LEN})
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**asked, "model": "gpt"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
