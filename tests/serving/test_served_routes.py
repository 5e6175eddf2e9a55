"""Tests of routes that requests ask for, against those of training's forward pass."""

import json
from dataclasses import replace

import pytest

from mhmoe_ray.evaluate.served_routes import ServedRoutes, compare_routes
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.spec import ServeSpec
from tests.serving.asking import answer_all, call
from tests.serving.conftest import SPEC, build_model
from tests.serving.prompts import mixed_requests


def test_served_routes_are_those_of_the_forward_pass(answerer):
    """Prompts are computed in chunks and answers token by token, among other requests, of which half ask for routes."""
    requests = [replace(request, return_routes=i % 2 == 0) for i, request in enumerate(mixed_requests())]
    answers = answer_all(answerer.engine, requests)
    served_routes = []
    for request, answer in zip(requests, answers, strict=True):
        token_ids = [*request.prompt_ids, *(scored.token for scored in answer.tokens)]
        # The last token of an answer is not computed, unless the answer ended with an end token, which is not in it.
        expected_ids = token_ids if answer.finish_reason == "stop" else token_ids[:-1]
        assert [route.token for route in answer.routes] == (expected_ids if request.return_routes else [])
        if answer.routes:
            served_routes.append(ServedRoutes(expected_ids, [route.experts for route in answer.routes]))
    agreements = compare_routes(build_model(), served_routes)
    assert len(agreements) == SPEC.moe_layers
    rows = SPEC.moe.heads * sum(len(routes.token_ids) for routes in served_routes)
    for agreement in agreements:
        assert (agreement.rows, agreement.different_rows) == (rows, 0)
        assert agreement.near_ties < rows / 10


def test_wrong_routes_are_found(answerer):
    [request, *_] = mixed_requests()
    [answer] = answer_all(answerer.engine, [replace(request, return_routes=True)])
    experts = [[list(layer) for layer in route.experts] for route in answer.routes]
    chosen_experts = experts[3][0]
    chosen_experts[0] = next(expert for expert in range(SPEC.moe.experts) if expert not in chosen_experts)
    routes = ServedRoutes([route.token for route in answer.routes], experts)
    first_layer, *_ = compare_routes(build_model(), [routes])
    assert first_layer.different_rows + first_layer.different_near_ties == 1


@pytest.mark.parametrize("stream", [False, True])
def test_choices_have_routes(answerer, stream):
    app = create_app(answerer, "tiny", ServeSpec())
    body = {
        "prompt": ["the quick", "fox"],
        "max_tokens": 5,
        "return_routes": True,
        "stream": stream,
        "logit_bias": {"0": -100},
    }
    response = call(app, "POST", "/v1/completions", json=body)
    assert response.status_code == 200, response.text
    bodies = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]] if stream else [response.json()]
    for number, prompt in enumerate(body["prompt"]):
        routes = [c["routes"] for b in bodies for c in b["choices"] if c["index"] == number and "routes" in c]
        token_ids = [token for part in routes for token in part["token_ids"]]
        assert token_ids[:-4] == answerer.encode(prompt)
        experts = [token for part in routes for token in part["experts"]]
        assert len(experts) == len(token_ids)
        assert {len(layer) for token in experts for layer in token} == {SPEC.moe.heads * SPEC.moe.top_k}


def test_routes_are_refused_where_there_are_none(answerer, monkeypatch):
    monkeypatch.setattr(answerer.engine, "returns_routes", False)
    body = {"prompt": "the", "return_routes": True}
    response = call(create_app(answerer, "tiny", ServeSpec()), "POST", "/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "return_routes"
