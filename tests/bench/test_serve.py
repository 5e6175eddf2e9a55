"""Tests of the server benchmarks: models, requests, clients, and a whole measurement at a tiny size."""

import json

import pytest
from aiohttp import ClientError
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from mhmoe_ray.bench.serve import child
from mhmoe_ray.bench.serve.child import Child
from mhmoe_ray.bench.serve.contest import Contest, Rates, TextLengths
from mhmoe_ray.bench.serve.engines import ContestModel
from mhmoe_ray.bench.serve.load import Load, RequestOutcome, closed_loop, open_loop
from mhmoe_ray.bench.serve.model import VOCAB_SIZE, plain_model, write_run
from mhmoe_ray.checkpoint.huggingface.adapters import choose_adapter
from mhmoe_ray.errors import JobError
from mhmoe_ray.planner.match import matched_heads
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.load import load_answerer
from tests.cli.run import mhmoe_subprocess
from tests.serving.conftest import serve_app

PLAIN = plain_model(64, 2, 4, 2, 64)


@pytest.fixture(scope="module")
def served_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return ContestModel(write_run(PLAIN, 128, folder / "bench-000000"), folder / "exported", "float32", 1, 4)


@pytest.mark.parametrize(("heads", "top_k"), [(2, 2), (4, 4), (4, 2)])
def test_matched_models_have_equal_work_and_parameters(heads, top_k):
    plain = plain_model(384, 4, 8, 2, 1024)
    model = matched_heads(plain, heads, None if top_k == heads else top_k)
    assert choose_adapter(plain, 64).model_type == "mixtral"
    assert (model.moe.heads, model.moe.top_k) == (heads, top_k)
    assert compute_sizes(model).parameters == pytest.approx(compute_sizes(plain).parameters, rel=0.04)
    macs, expected_macs = (
        compute_sizes(m).moe_macs_per_token - compute_sizes(m).router_macs_per_token for m in (model, plain)
    )
    assert macs == pytest.approx(expected_macs, rel=0.1)


def test_requests_depend_on_round_only():
    shape = TextLengths(40, 20, is_equal=False)
    prompts = shape.requests(500, "1 16")
    assert prompts == shape.requests(500, "1 16")
    assert prompts != shape.requests(500, "2 16")
    for lengths, mean in (([len(ids) for ids, _ in prompts], 40), ([tokens for _, tokens in prompts], 20)):
        assert (min(lengths), max(lengths)) == (mean // 4, mean * 7 // 4)
        assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.1)
    assert {(len(ids), tokens) for ids, tokens in TextLengths(40, 20).requests(9, "")} == {(40, 20)}
    assert all(0 < token < VOCAB_SIZE for ids, _ in prompts for token in ids)


def test_clients_count_tokens_and_time_first_token(served_model):
    spec = served_model.serve_spec("torch")
    answerer = load_answerer(served_model.checkpoint, spec)
    requests = TextLengths(8, 6).requests(6, "")
    try:
        with serve_app(create_app(answerer, "bench", spec)) as url:
            loads = [closed_loop(url, requests, 3, stream) for stream in (True, False)]
            loads.append(open_loop(url, requests, 50.0, seed=1))
    finally:
        answerer.engine.close()
    for load, is_streamed in zip(loads, (True, False, True), strict=True):
        assert len(load.outcomes) == 6
        assert [a.tokens for a in load.outcomes] == [6] * 6
        assert load.rate == pytest.approx(36 / load.seconds)
        for outcome in load.outcomes:
            assert (outcome.first_token_seconds is not None) == is_streamed
            assert 0 < (outcome.first_token_seconds or outcome.total_seconds) <= outcome.total_seconds <= load.seconds


def test_answer_that_fails_midway_is_an_error():
    app = FastAPI()

    @app.post("/v1/completions")
    def stream_error():
        events = ['data: {"choices": []}\n\n', 'data: {"error": {"message": "the server failed"}}\n\n']
        return StreamingResponse(iter(events), media_type="text/event-stream")

    with serve_app(app) as url, pytest.raises(ClientError, match="the server failed"):
        closed_loop(url, [((1,), 4)], 1, stream=True)


def test_first_token_time_is_median_over_requests():
    load = Load(2.0, [RequestOutcome(tenths / 10, 1.0, 5) for tenths in range(1, 11)])
    assert load.rate == 25
    assert load.first_token_seconds == pytest.approx(0.55)
    assert Load(2.0, [RequestOutcome(None, 1.0, 5)]).first_token_seconds is None


def test_rates_are_compared_per_round():
    our_rates, peer_rates = Rates("ours", 4, [10, 20, 30], []), Rates("theirs", 4, [10, 10, 10], [])
    assert our_rates.rate == 20
    assert our_rates.ratio_to(peer_rates) == 2


@pytest.mark.slow  # test_command_prints_table_and_json measures engines too
def test_engines_and_servers_answer_in_processes(served_model):
    lines = []
    contest = Contest(TextLengths(8, 4, is_equal=False), [1, 2], 1, lines.append)
    [first_rates, second_rates] = contest.measure_engines({"own": ("torch", served_model)})
    assert (first_rates.clients, second_rates.clients) == (1, 2)
    assert min(first_rates.rate, second_rates.rate) > 0
    contest = Contest(TextLengths(8, 4), [2], 1, lines.append)
    [streamed_rates] = contest.measure_servers(["torch, alone"], served_model, stream=True)
    assert streamed_rates.first_token_seconds[0] > 0
    assert [line.split(":")[0] for line in lines] == [
        "round 1, 2 at a time",
        "round 1, 1 at a time",
        "round 1, 2 clients",
    ]


@pytest.mark.long
def test_failed_contestant_reports_cause(served_model):
    missing_model = served_model._replace(checkpoint=served_model.checkpoint / "gone")
    with pytest.raises(JobError, match=r"bench serve, torch: .*manifest\.json"), Child("torch", missing_model):
        pass


def test_hanging_contestant_is_ended_and_named(served_model, monkeypatch):
    monkeypatch.setattr(child, "ANSWER_TIMEOUT", 0.1)
    # In tests that run in the background, the contestant inherits an ignored SIGINT, so it is killed after this
    # timeout.
    monkeypatch.setattr(child, "EXIT_TIMEOUT", 3.0)
    contestant = Child("torch", served_model)
    with pytest.raises(JobError, match="bench serve, torch: it has not answered in 0 s"), contestant:
        pass
    assert contestant._process.returncode


def test_command_prints_table_and_json(tmp_path):
    sizes = ["--d-model", "64", "--layers", "1", "--experts", "2", "--d-expert", "32"]
    options = ["--clients", "2", "--rounds", "1", "--prompt", "8", "--tokens", "4"]
    result = mhmoe_subprocess(tmp_path, "bench", "serve", "engines", *sizes, *options, "--json")
    output = json.loads(result.out)
    [figures] = output["engines, tokens a second"]
    assert figures["name"] == "torch"
    assert figures["rate"] > 0
    assert output["models"]["SMoE"]["moe"]["experts"] == 2
    assert "answers of 4 tokens on average" in result.err
