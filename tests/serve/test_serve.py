"""The application on a real Ray Serve, deployed by the configuration that the command line sends."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec

import httpx
import pytest
import ray

from mhmoe_ray.serve.config import DEPLOYMENT, application_config
from mhmoe_ray.serve.engine import Sampling
from mhmoe_ray.spec import KeySpec, ServeSpec
from mhmoe_ray.spec.cluster import WorkerRange

from .asking import pieces
from .conftest import SEQ_LEN
from .deployed import deploy, details, running, serving, wait_until

pytestmark = pytest.mark.ray

LIMITED, TALKER, FREE = "secret", "of few words", "of all other tests"
KEYS = (
    KeySpec(name="ann", sha256=sha256(LIMITED.encode()).hexdigest(), requests_per_minute=6),
    KeySpec(name="eve", sha256=sha256(TALKER.encode()).hexdigest(), tokens_per_minute=10),
    # More than there ever are, so that all requests go by what counts them.
    KeySpec(name="bob", sha256=sha256(FREE.encode()).hexdigest(), requests_per_minute=1_000_000),
)
SPEC = ServeSpec(max_tokens=40, keys=KEYS)
TWO = SPEC.model_copy(update={"replicas": WorkerRange(min=2, max=2)})


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def port(checkpoint):
    with serving() as port:
        deploy([application_config("tiny", checkpoint, SPEC, "tiny-abc123")])
        wait_until("tiny", "RUNNING")
        yield port


@pytest.fixture(scope="module")
def client(port):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=bearer(FREE)) as client:
        yield client


def complete(client, **body):
    response = client.post("/v1/completions", json={"prompt": "the quick", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


@contextmanager
def asking(ask):
    """Let four clients ask during the block, each again as soon as it has its answer; the yielded list collects the
    answers."""
    over, answers = threading.Event(), []

    def again_and_again():
        while not over.is_set():
            answers.append(ask())

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(again_and_again) for _ in range(4)]
        try:
            yield answers
        finally:
            over.set()
    for one in clients:
        one.result()


def slowly(body):
    """Yield a request body in two parts, with a pause between them.

    Such a request is under way for long and takes little from a replica that starts meanwhile.
    """
    whole = json.dumps(body).encode()
    yield whole[:1]
    time.sleep(0.3)
    yield whole[1:]


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
    """The update serves the same weights from other files, so that every answer is the same whichever replica gave
    it."""
    [before] = client.get("/stats").json()["replicas"]
    body = {"prompt": "the quick", "temperature": 0, "max_tokens": 40}
    expected = complete(client, **body)["choices"]

    def ask():
        return client.post("/v1/completions", content=slowly(body), headers={"Content-Type": "application/json"})

    with asking(ask) as answers:
        deploy([application_config("tiny", spread_checkpoint, SPEC, "tiny-abc123")])
        deadline = time.monotonic() + 120
        while (replicas := client.get("/stats").json()["replicas"])[0]["replica"] == before["replica"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert len(answers) > 10
    assert {response.status_code for response in answers} == {200}
    assert all(response.json()["choices"] == expected for response in answers)
    assert len(replicas) == 1


def test_each_replica_tells_what_it_did(client, checkpoint):
    deploy([application_config("tiny", checkpoint, TWO, "tiny-abc123")])
    wait_until("tiny", "RUNNING")
    before = {told["replica"]: told["answer_tokens"] for told in client.get("/stats").json()["replicas"]}
    assert len(before) == 2
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: complete(client, seed=seed, max_tokens=10), range(16)))
    after = {told["replica"]: told["answer_tokens"] for told in client.get("/stats").json()["replicas"]}
    assert sum(after.values()) - sum(before.values()) == 160
    assert after.keys() == before.keys()


def test_rays_own_metrics_have_what_replicas_count(client):
    """The metrics are on the port of the node that Prometheus asks.

    A replica reports every two seconds, and Ray's agent now and then.
    """
    complete(client, max_tokens=5)
    [node] = ray.nodes()
    deadline = time.monotonic() + 60
    while True:
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        found = [line for line in text.splitlines() if line.startswith("ray_mhmoe_answer_tokens_total{")]
        if found and sum(float(line.split()[-1]) for line in found) >= 5:
            break
        assert time.monotonic() < deadline, [line for line in text.splitlines() if "mhmoe" in line]
        time.sleep(0.5)
    assert 'model="tiny-abc123"' in found[0]
    assert 'application="tiny"' in found[0]
    assert "ray_mhmoe_first_token_seconds_bucket_total{" in text
    assert "ray_mhmoe_expert_routes_total{" in text
    assert "ray_mhmoe_running{" in text


def test_a_replica_that_is_killed_loses_no_request_but_its_own(port, client, checkpoint):
    """Two replicas give answers of 40 tokens, and one of them is killed.

    Its requests are lost with a clear error. All others are answered, also those that come while another replica starts
    in its place.
    """
    deploy([application_config("tiny", checkpoint, TWO, "tiny-abc123")])
    wait_until("tiny", "RUNNING")
    body = {"prompt": "the quick", "temperature": 0, "max_tokens": 40}
    expected = complete(client, **body)["choices"]
    killed = threading.Event()

    def ask():
        if killed.is_set():
            time.sleep(0.3)  # who starts in its place needs a core
        return client.post("/v1/completions", json=body)

    with asking(ask) as answers:
        time.sleep(1)
        [victim, _] = details("tiny")["deployments"][DEPLOYMENT]["replicas"]
        os.kill(victim["pid"], signal.SIGKILL)
        killed.set()
        deadline = time.monotonic() + 120
        while victim["replica_id"] in (found := running("tiny")) or len(found) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
    lost = [a for a in answers if a.status_code != 200]
    assert len(lost) <= 4  # one client has one request at a time
    assert [(a.status_code, a.json()["error"]["code"]) for a in lost] == [(503, "lost")] * len(lost)
    assert all(a.json()["choices"] == expected for a in answers if a not in lost)


@pytest.mark.slow
def test_replicas_come_with_requests_and_go_without(client, checkpoint):
    elastic = SPEC.model_copy(update={"replicas": WorkerRange(min=1, max=2), "max_concurrency": 1})
    config = application_config("tiny", checkpoint, elastic, "tiny-abc123")
    scaling = config["deployments"][0]["autoscaling_config"]
    assert scaling == {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    # Ray waits for half a minute before it adds one, and for ten before it takes one away.
    scaling |= {"upscale_delay_s": 1, "downscale_delay_s": 2, "look_back_period_s": 20}
    deploy([config])
    wait_until("tiny", "RUNNING")

    def until(replicas):
        deadline = time.monotonic() + 120
        while len(running("tiny")) != replicas:
            assert time.monotonic() < deadline
            yield

    assert len(running("tiny")) == 1
    with ThreadPoolExecutor(6) as pool:
        for _ in until(2):
            list(pool.map(lambda seed: complete(client, seed=seed, max_tokens=40), range(12)))
    for _ in until(1):
        time.sleep(0.2)
    assert complete(client, max_tokens=5)["usage"]["completion_tokens"] == 5


def test_limits_of_a_key_hold_for_all_replicas_together(port, checkpoint):
    deploy([application_config("tiny", checkpoint, TWO, "tiny-abc123")])
    wait_until("tiny", "RUNNING")
    assert len(running("tiny")) == 2

    def ask(key, max_tokens):
        body = {"prompt": "the", "max_tokens": max_tokens, "temperature": 0}
        return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=bearer(key), timeout=30)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(LIMITED, 1), range(12)))
    assert [response.status_code for response in answers].count(200) in (6, 7)  # a seventh after ten seconds
    refused = next(response for response in answers if response.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) <= 11
    assert ask(TALKER, 40).status_code == 200
    deadline = time.monotonic() + 30
    while (refused := ask(TALKER, 1)).status_code == 200:  # a replica does not wait until its tokens are counted
        assert time.monotonic() < deadline
    assert "all its tokens" in refused.json()["error"]["message"]


def test_a_checkpoint_that_cannot_be_served_fails_in_one_line_and_the_other_goes_on(client, checkpoint):
    missing = checkpoint.with_name("step_00000099.1")
    good = application_config("tiny", checkpoint, TWO, "tiny-abc123")
    bad = application_config("missing", missing, SPEC, "missing")
    deploy([good, {**bad, "route_prefix": "/missing"}])
    wait_until("missing", "DEPLOY_FAILED")
    reason = f"checkpoint {missing}: it has no readable manifest.json; use another checkpoint of the run"
    assert details("missing")["message"].splitlines()[1:] == [reason]
    if find_spec("vllm") is None:
        absent = application_config("absent", checkpoint, SPEC.model_copy(update={"engine": "vllm"}), "absent")
        deploy([good, {**absent, "route_prefix": "/absent"}])
        wait_until("absent", "DEPLOY_FAILED")
        [_, reason] = details("absent")["message"].splitlines()
        assert reason.startswith("engine vllm: vLLM is not installed; install vllm where replicas run")
    assert client.get("/health").status_code == 200
