"""Tests that each sampling parameter can be given to the command, in Python, to a batch inference and over HTTP."""

import inspect
import json

import pytest
import typer
from pydantic import ValidationError
from typer.main import get_command

from mhmoe_ray.api.generation import SamplingArguments
from mhmoe_ray.api.model import LoadedModel
from mhmoe_ray.cli.app import app
from mhmoe_ray.serving.api.schema import ChatRequest, CompletionRequest
from mhmoe_ray.serving.batch.request import BatchRequest
from mhmoe_ray.serving.sampling import CommonSampling, SamplingParams

FIELDS = SamplingParams.model_fields
VALUES = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "presence_penalty": -1.5,
    "frequency_penalty": 1.5,
    "repetition_penalty": 1.25,
    "min_tokens": 4,
    "ignore_eos": True,
    "seed": -3,
    "stop": ["a", "b"],
    "max_tokens": 5,
    "logit_bias": {3: -2.5},
    "logprobs": 2,
}
"""A value of each field that is not its default."""


def test_every_field_can_be_given_to_the_command(monkeypatch):
    answered = []
    monkeypatch.setattr("mhmoe_ray.cli.generate_batch.answer_file", lambda *arguments: answered.append(arguments[3]))
    command = ["generate", "--input", "in.jsonl", "--output", "out"]
    words = []
    for name, value in (VALUES | {"logit_bias": "3=-2.5"}).items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", *([] if item is True else [str(item)])]
    main = get_command(app).main
    for arguments in (words, []):
        main([*command, *arguments], standalone_mode=False)
    assert answered == [SamplingParams(**VALUES), SamplingParams()]
    for option in (["--max-tokens", "0"], ["--top-p", "1.5"], ["--logprobs", "21"], ["--temperature", "2.5"]):
        with pytest.raises(typer.BadParameter, match=r"Input should be|is not in the range"):
            main([*command, *option], standalone_mode=False)
    with pytest.raises(typer.BadParameter, match="--logit-bias 3: give a token id and an amount"):
        main([*command, "--logit-bias", "3"], standalone_mode=False)
    options = {option.name: option for option in get_command(app).commands["generate"].params}
    for name, field in FIELDS.items():
        assert options[name].help.startswith(field.description)


def test_every_field_can_be_given_in_python():
    assert set(SamplingArguments.__annotations__) == set(FIELDS)
    for function in (LoadedModel.generate, LoadedModel.stream):
        assert "sampling" in inspect.signature(function).parameters
    for name, field in FIELDS.items():
        default = "()" if name == "stop" else field.default
        assert f"{name}={default}: " in inspect.getdoc(LoadedModel.generate)


def test_every_field_is_part_of_a_batch_inference():
    assert BatchRequest.model_fields["sampling"].annotation is SamplingParams
    params = SamplingParams(**VALUES)
    assert SamplingParams.model_validate_json(params.model_dump_json()) == params
    # The requests of earlier versions have fewer fields.
    stored = {"max_tokens": 12, "temperature": 0.5, "top_p": 1.0, "seed": None, "stop": ["x"], "logprobs": None}
    assert SamplingParams.model_validate_json(json.dumps(stored)) == SamplingParams(
        max_tokens=12, temperature=0.5, stop=["x"]
    )


def test_every_field_can_be_given_over_http():
    body = {**VALUES, "logit_bias": {"3": -2.5}}
    completion = CompletionRequest(prompt="a", **body)
    chat = ChatRequest(messages=[{"role": "user", "content": "a"}], **body | {"logprobs": True, "top_logprobs": 2})
    for request in (completion, chat):
        assert set(FIELDS) <= set(type(request).model_fields)
        assert request.sampling_params(request.max_tokens, 2) == SamplingParams(**VALUES)
    defaults = CompletionRequest(prompt="a")
    assert defaults.sampling_params(128, None) == SamplingParams()


def test_values_are_no_defaults():
    assert {name for name, field in FIELDS.items() if VALUES[name] != field.default} == set(FIELDS)
    assert set(CommonSampling.model_fields) < set(FIELDS)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0},
        {"max_tokens": 0},
        {"temperature": float("inf")},
        {"top_q": 1},
        {"repetition_penalty": 0},
        {"min_tokens": 129},
        {"min_tokens": 4, "max_tokens": 3},
        {"ignore_eos": 1},
    ],
)
def test_wrong_values_are_refused(fields):
    with pytest.raises(ValidationError):
        SamplingParams(**fields)
