"""Server benchmarks: the models, the requests, the clients, and one whole measurement at a tiny size."""

import json

import pytest
from aiohttp import ClientError
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from mhmoe_ray.bench.serve import child
from mhmoe_ray.bench.serve.child import Child
from mhmoe_ray.bench.serve.contest import Rates, Shape, engines, servers
from mhmoe_ray.bench.serve.engines import Place
from mhmoe_ray.bench.serve.load import Asked, Load, closed_loop, open_loop
from mhmoe_ray.bench.serve.model import VOCAB, plain_model, write_run
from mhmoe_ray.checkpoint.huggingface.config import is_mixtral
from mhmoe_ray.errors import JobError
from mhmoe_ray.planner.match import matched_heads
from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.serve.api.app import create_app
from mhmoe_ray.serve.load import load_answerer
from tests.cli.run import mhmoe_anew
from tests.serve.conftest import running

PLAIN = plain_model(64, 2, 4, 2, 64)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return Place(write_run(PLAIN, 128, folder / "bench-000000"), folder / "exported", "float32", 1, 4)


@pytest.mark.parametrize(("heads", "top_k"), [(2, 2), (4, 4), (4, 2)])
def test_models_beside_the_plain_one_have_its_work_and_parameters(heads, top_k):
    plain = plain_model(384, 4, 8, 2, 1024)
    model = matched_heads(plain, heads, None if top_k == heads else top_k)
    assert is_mixtral(plain)
    assert (model.moe.heads, model.moe.top_k) == (heads, top_k)
    assert sizes(model).parameters == pytest.approx(sizes(plain).parameters, rel=0.04)
    found, expected = (sizes(m).moe_macs_per_token - sizes(m).router_macs_per_token for m in (model, plain))
    assert found == pytest.approx(expected, rel=0.1)


def test_every_contestant_gets_the_same_requests_and_no_round_those_of_another():
    shape = Shape(40, 20, equal=False)
    asked = shape.requests(500, "1 16")
    assert asked == shape.requests(500, "1 16")
    assert asked != shape.requests(500, "2 16")
    for lengths, mean in (([len(ids) for ids, _ in asked], 40), ([tokens for _, tokens in asked], 20)):
        assert (min(lengths), max(lengths)) == (mean // 4, mean * 7 // 4)
        assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.1)
    assert {(len(ids), tokens) for ids, tokens in Shape(40, 20).requests(9, "")} == {(40, 20)}
    assert all(0 < token < VOCAB for ids, _ in asked for token in ids)


def test_clients_count_tokens_and_time_first_ones(place):
    spec = place.spec("torch")
    answerer = load_answerer(place.checkpoint, spec)
    requests = Shape(8, 6).requests(6, "")
    try:
        with running(create_app(answerer, "bench", spec)) as url:
            loads = [closed_loop(url, requests, 3, stream) for stream in (True, False)]
            loads.append(open_loop(url, requests, 50.0, seed=1))
    finally:
        answerer.engine.close()
    for load, streamed in zip(loads, (True, False, True), strict=True):
        assert len(load.asked) == 6
        assert [a.tokens for a in load.asked] == [6] * 6
        assert load.rate == pytest.approx(36 / load.seconds)
        for asked in load.asked:
            assert (asked.first is not None) == streamed
            assert 0 < (asked.first or asked.whole) <= asked.whole <= load.seconds


def test_an_answer_that_fails_on_the_way_is_no_answer():
    app = FastAPI()

    @app.post("/v1/completions")
    def fails():
        events = ['data: {"choices": []}\n\n', 'data: {"error": {"message": "the server failed"}}\n\n']
        return StreamingResponse(iter(events), media_type="text/event-stream")

    with running(app) as url, pytest.raises(ClientError, match="the server failed"):
        closed_loop(url, [((1,), 4)], 1, stream=True)


def test_the_first_token_is_waited_for_as_the_median_request_did():
    load = Load(2.0, [Asked(first / 10, 1.0, 5) for first in range(1, 11)])
    assert load.rate == 25
    assert load.first == pytest.approx(0.55)
    assert Load(2.0, [Asked(None, 1.0, 5)]).first is None


def test_a_contestant_is_set_beside_another_round_by_round():
    ours, theirs = Rates("ours", 4, [10, 20, 30], []), Rates("theirs", 4, [10, 10, 10], [])
    assert ours.rate == 20
    assert ours.to(theirs) == 2


def test_engines_and_servers_answer_each_in_a_process_of_its_own(place):
    said = []
    [one, two] = engines({"own": ("torch", place)}, Shape(8, 4, equal=False), [1, 2], 1, said.append)
    assert (one.clients, two.clients) == (1, 2)
    assert min(one.rate, two.rate) > 0
    [streamed] = servers(["torch, alone"], place, Shape(8, 4), [2], True, 1, said.append)
    assert streamed.first[0] > 0
    assert [line.split(":")[0] for line in said] == [
        "round 1, 2 at a time",
        "round 1, 1 at a time",
        "round 1, 2 clients",
    ]


@pytest.mark.long
def test_a_contestant_that_fails_says_why(place):
    gone = place._replace(checkpoint=place.checkpoint / "gone")
    with pytest.raises(JobError, match=r"bench serve, torch: .*manifest\.json"), Child("torch", gone):
        pass


def test_a_contestant_that_hangs_is_ended_and_named(place, monkeypatch):
    monkeypatch.setattr(child, "MOST_SECONDS", 0.1)
    monkeypatch.setattr(child, "END_SECONDS", 3.0)  # a test run in the background hands down an ignored SIGINT
    own = Child("torch", place)
    with pytest.raises(JobError, match="bench serve, torch: it has not answered in 0 s"), own:
        pass
    assert own._process.returncode


def test_the_command_prints_a_table_or_json(tmp_path):
    sizes = ["--d-model", "64", "--layers", "1", "--experts", "2", "--d-expert", "32"]
    rest = ["--clients", "2", "--rounds", "1", "--prompt", "8", "--tokens", "4"]
    done = mhmoe_anew(tmp_path, "bench", "serve", "engines", *sizes, *rest, "--json")
    found = json.loads(done.out)
    [figures] = found["engines, tokens a second"]
    assert figures["name"] == "torch"
    assert figures["rate"] > 0
    assert found["models"]["SMoE"]["moe"]["experts"] == 2
    assert "answers of 4 tokens on average" in done.err
