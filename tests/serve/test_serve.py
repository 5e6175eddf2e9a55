"""The application through a real Ray Serve, deployed by the configuration that the command line sends."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mhmoe_ray.serve.config import application_config
from mhmoe_ray.serve.engine import Sampling
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.spec.cluster import WorkerRange

from .asking import pieces
from .conftest import SEQ_LEN
from .deployed import deploy, details, serving, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

SPEC = ServeSpec(max_tokens=40)


@pytest.fixture(scope="module")
def port(checkpoint):
    with serving() as port:
        deploy([application_config("tiny", checkpoint, SPEC, "tiny-abc123")])
        wait_until("tiny", "RUNNING")
        yield port


@pytest.fixture(scope="module")
def client(port):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client


def complete(client, **body):
    response = client.post("/v1/completions", json={"prompt": "the quick", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_answer_is_that_of_the_engine(client, answerer):
    ids = answerer.encode("the quick")
    found = pieces(answerer, ids, Sampling(20, temperature=0))
    answer = complete(client, max_tokens=20, model="tiny-abc123")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny-abc123"
    assert answer["choices"] == [
        {"index": 0, "text": "".join(p.text for p in found), "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 20,
        "total_tokens": len(ids) + 20,
    }


def test_a_streamed_answer_is_the_same(client):
    body = {"prompt": "the quick", "temperature": 1.2, "seed": 3, "max_tokens": 30, "echo": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    choices = [json.loads(c)["choices"][0] for c in chunks]
    assert done == "[DONE]"
    (plain,) = complete(client, **{**body, "stream": False})["choices"]
    assert "".join(c["text"] for c in choices) == plain["text"]
    assert plain["text"].startswith("the quick")
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [plain["finish_reason"]]


def test_requests_at_once_are_answered_as_alone(client):
    bodies = [{"temperature": 1.5, "seed": seed, "max_tokens": 20} for seed in range(4)]
    alone = [complete(client, **b)["choices"] for b in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda b: complete(client, **b)["choices"], bodies * 2))
    assert together == alone * 2


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"prompt": "the", "best_of": 2}, 400, "best_of", "is not supported"),
        ({"prompt": "z" * SEQ_LEN}, 400, "prompt", f"prompt and answer together may have {SEQ_LEN}"),
        ({"prompt": "the", "max_tokens": 41}, 400, "max_tokens", "at most 40"),
        ({"prompt": "the", "temperature": "x"}, 400, "temperature", "valid number"),
        ({"prompt": "the", "model": "gpt"}, 404, "model", "no model 'gpt'"),
        ({}, 400, "prompt", "required"),
    ],
)
def test_errors(client, body, status, param, says):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert says in response.json()["error"]["message"]


def test_models_and_health(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny-abc123", SEQ_LEN)
    assert client.get("/health").status_code == 200
    assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_an_update_refuses_no_request_and_ends_what_was_begun(client, checkpoint, spread_checkpoint):
    """The same weights from other files, so that every answer is the same whichever replica gave it."""
    [before] = client.get("/stats").json()["replicas"]
    body = {"prompt": "the quick", "temperature": 0, "max_tokens": 40}
    expected = complete(client, **body)["choices"]
    over = threading.Event()

    def ask(_):
        found = []
        while not over.is_set():
            found.append(client.post("/v1/completions", json=body))
        return found

    with ThreadPoolExecutor(4) as pool:
        asked = pool.map(ask, range(4))
        deploy([application_config("tiny", spread_checkpoint, SPEC, "tiny-abc123")])
        deadline = time.monotonic() + 120
        while (replicas := client.get("/stats").json()["replicas"])[0]["replica"] == before["replica"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        over.set()
        answers = [response for responses in asked for response in responses]
    assert len(answers) > 10
    assert {response.status_code for response in answers} == {200}
    assert all(response.json()["choices"] == expected for response in answers)
    assert len(replicas) == 1


def test_each_replica_tells_what_it_did(client, checkpoint):
    two = SPEC.model_copy(update={"replicas": WorkerRange(min=2, max=2)})
    deploy([application_config("tiny", checkpoint, two, "tiny-abc123")])
    wait_until("tiny", "RUNNING")
    before = {told["replica"]: told["answer_tokens"] for told in client.get("/stats").json()["replicas"]}
    assert len(before) == 2
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: complete(client, seed=seed, max_tokens=10), range(16)))
    after = {told["replica"]: told["answer_tokens"] for told in client.get("/stats").json()["replicas"]}
    assert sum(after.values()) - sum(before.values()) == 160
    assert after.keys() == before.keys()


def test_a_checkpoint_that_cannot_be_served_fails_in_one_line_and_the_other_goes_on(client, checkpoint):
    missing = checkpoint.with_name("step_00000099.1")
    good, bad = (application_config(n, c, SPEC, n) for n, c in (("tiny", checkpoint), ("missing", missing)))
    good["args"]["model"] = "tiny-abc123"
    deploy([good, {**bad, "route_prefix": "/missing"}])
    wait_until("missing", "DEPLOY_FAILED")
    reason = f"checkpoint {missing}: it has no readable manifest.json; use another checkpoint of the run"
    assert details("missing")["message"].splitlines()[1:] == [reason]
    assert client.get("/health").status_code == 200
