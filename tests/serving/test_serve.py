"""Tests of the application on a real Ray Serve, deployed by the configuration that the command line sends."""

import itertools
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from importlib.util import find_spec

import httpx
import pytest
import ray

from mhmoe_ray.serving.api.access import BODY_SECONDS
from mhmoe_ray.serving.config import DEPLOYMENT, application_config
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import KeySpec, ServeSpec
from mhmoe_ray.spec.cluster import WorkerRange

from .adapters import save_adapter
from .asking import answer_pieces
from .conftest import SEQ_LEN, build_model, save_checkpoint
from .deployed import application_details, deploy, running_replicas, start_ray_serve, wait_for_status

pytestmark = pytest.mark.ray

LIMITED, TALKER, FREE = "key of ann", "key of eve", "key of bob"
KEYS = (
    KeySpec(name="ann", sha256=sha256(LIMITED.encode()).hexdigest(), requests_per_minute=6),
    KeySpec(name="eve", sha256=sha256(TALKER.encode()).hexdigest(), tokens_per_minute=10),
    # This limit is never reached, but because of it all requests of this client pass the rate limiter.
    KeySpec(name="bob", sha256=sha256(FREE.encode()).hexdigest(), requests_per_minute=1_000_000),
)
SPEC = ServeSpec(max_tokens=40, keys=KEYS)
TWO = SPEC.model_copy(update={"replicas": WorkerRange(min=2, max=2)})


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def port(checkpoint):
    with start_ray_serve() as port:
        deploy([application_config("tiny", checkpoint, TWO, "tiny-abc123")])
        wait_for_status("tiny", "RUNNING")
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
def run_clients(ask):
    """Run four clients during the block, and yield the list to which they append what `ask` returns.

    Each client sends its next request as soon as it has an answer.
    """
    stop_event, answers = threading.Event(), []

    def ask_repeatedly():
        while not stop_event.is_set():
            answers.append(ask())

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask_repeatedly) for _ in range(4)]
        try:
            yield answers
        finally:
            stop_event.set()
    for client in clients:
        client.result()


def slow_body(body):
    """Yield a request body in two parts, with a pause between them.

    Such a request runs for a long time, but leaves the CPU to a replica that starts.
    """
    encoded_body = json.dumps(body).encode()
    yield encoded_body[:1]
    time.sleep(0.3)
    yield encoded_body[1:]


def test_deployed_answer_equals_the_engines(client, answerer):
    ids = answerer.encode("the quick")
    expected_pieces = answer_pieces(answerer, ids, SamplingParams(max_tokens=20, temperature=0))
    answer = complete(client, max_tokens=20, model="tiny-abc123")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny-abc123"
    assert answer["choices"] == [
        {"index": 0, "text": "".join(p.text for p in expected_pieces), "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 20,
        "total_tokens": len(ids) + 20,
    }


def test_streamed_answer_equals_the_complete_one(client):
    body = {"prompt": "the quick", "temperature": 1.2, "seed": 3, "max_tokens": 30, "echo": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, end_marker = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    choices = [json.loads(c)["choices"][0] for c in chunks]
    assert end_marker == "[DONE]"
    (choice,) = complete(client, **{**body, "stream": False})["choices"]
    assert "".join(c["text"] for c in choices) == choice["text"]
    assert choice["text"].startswith("the quick")
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [choice["finish_reason"]]


def test_concurrent_requests_get_the_same_answers(client):
    bodies = [{"temperature": 1.5, "seed": seed, "max_tokens": 20} for seed in range(4)]
    single_answers = [complete(client, **b)["choices"] for b in bodies]
    with ThreadPoolExecutor(8) as pool:
        concurrent_answers = list(pool.map(lambda b: complete(client, **b)["choices"], bodies * 2))
    assert concurrent_answers == single_answers * 2


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"prompt": "the", "best_of": 2}, 400, "best_of", "is not supported"),
        ({"prompt": "z" * SEQ_LEN}, 400, "prompt", f"prompt and answer together may have {SEQ_LEN}"),
        ({"prompt": "the", "max_tokens": 41}, 400, "max_tokens", "at most 40"),
        ({"prompt": "the", "temperature": "x"}, 400, "temperature", "valid number"),
        ({"prompt": "the", "model": "gpt"}, 404, "model", "no model 'gpt'"),
        ({}, 400, "prompt", "required"),
    ],
)
def test_wrong_requests_are_refused(client, body, status, param, message):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert message in response.json()["error"]["message"]


def test_models_and_health_are_served(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny-abc123", SEQ_LEN)
    assert client.get("/health").status_code == 200
    assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"


@pytest.mark.slow  # the quick test, in tests/cli/test_runs.py, also updates a served checkpoint under requests
def test_update_completes_all_requests(client, checkpoint, expert_parallel_checkpoint):
    """All requests are answered while a new replica replaces the old one.

    The update serves the same weights from other files, so both replicas give the same answers.
    """
    deploy([application_config("tiny", checkpoint, SPEC, "tiny-abc123")])
    wait_for_status("tiny", "RUNNING")
    [previous_stats] = client.get("/stats").json()["replicas"]
    body = {"prompt": "the quick", "temperature": 0, "max_tokens": 40}
    expected = complete(client, **body)["choices"]

    def ask():
        return client.post("/v1/completions", content=slow_body(body), headers={"Content-Type": "application/json"})

    with run_clients(ask) as answers:
        deploy([application_config("tiny", expert_parallel_checkpoint, SPEC, "tiny-abc123")])
        deadline = time.monotonic() + 120
        while (replicas := client.get("/stats").json()["replicas"])[0]["replica"] == previous_stats["replica"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert len(answers) > 10
    assert {response.status_code for response in answers} == {200}
    assert all(response.json()["choices"] == expected for response in answers)
    assert len(replicas) == 1


@pytest.mark.slow
def test_update_under_load_loses_no_request_and_answers_name_their_weights(client, checkpoint, run_dir):
    """All of 2,000 requests during updates are answered; 200 answers equal those of the checkpoints that they name."""
    other_model = build_model()
    for p in other_model.blocks.parameters():
        p.mul_(1.1)
    checkpoints = {40: save_checkpoint(run_dir, 40, other_model), 1: checkpoint}
    spec = SPEC.model_copy(update={"max_tokens": 12})
    deploy([application_config("tiny", checkpoint, spec, "tiny-abc123")])
    wait_for_status("tiny", "RUNNING")
    numbers = itertools.count()

    def ask():
        body = {"prompt": [1 + (number := next(numbers)) % 200, 5], "temperature": 0, "max_tokens": 12}
        return number, client.post("/v1/completions", json=body)

    with run_clients(ask) as answers:
        # The first update comes at once, and later ones as long as there are too few answers.
        for updated_checkpoint in itertools.cycle(checkpoints.values()):
            deploy([application_config("tiny", updated_checkpoint, spec, "tiny-abc123")])
            wait_for_status("tiny", "RUNNING")
            if len(answers) >= 2000:
                break
    assert {response.status_code for _, response in answers} == {200}
    steps = Counter(int(response.headers["x-mhmoe-step"]) for _, response in answers)
    assert min(steps[step] for step in checkpoints) > 100
    served = {step: load_answerer(path, ServeSpec()) for step, path in checkpoints.items()}
    try:
        for number, response in random.Random(1).sample(answers, 200):
            answerer = served[int(response.headers["x-mhmoe-step"])]
            assert response.headers["x-mhmoe-digest"] == answerer.details.digest
            pieces = answer_pieces(answerer, (1 + number % 200, 5), SamplingParams(max_tokens=12, temperature=0))
            assert response.json()["choices"][0]["text"] == "".join(piece.text for piece in pieces)
    finally:
        for answerer in served.values():
            answerer.engine.close()


def test_stats_list_each_replica(client, checkpoint):
    deploy([application_config("tiny", checkpoint, TWO, "tiny-abc123")])
    wait_for_status("tiny", "RUNNING")
    initial_tokens = {stats["replica"]: stats["answer_tokens"] for stats in client.get("/stats").json()["replicas"]}
    assert len(initial_tokens) == 2
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: complete(client, seed=seed, max_tokens=10), range(16)))
    final_tokens = {stats["replica"]: stats["answer_tokens"] for stats in client.get("/stats").json()["replicas"]}
    assert sum(final_tokens.values()) - sum(initial_tokens.values()) == 160
    assert final_tokens.keys() == initial_tokens.keys()


def test_ray_metrics_have_the_replicas_counts(client):
    """The node's port for Prometheus has the metrics of the replica within a minute.

    A replica reports every two seconds, and Ray's agent at intervals of its own, not all metrics at once.
    """
    complete(client, max_tokens=5)
    [node] = ray.nodes()
    expected_names = {
        f"ray_mhmoe_{name}" for name in ("first_token_seconds_bucket_total", "expert_routes_total", "running")
    }
    deadline = time.monotonic() + 60
    while True:
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        names = {line.split("{")[0] for line in text.splitlines()}
        metric_lines = [line for line in text.splitlines() if line.startswith("ray_mhmoe_answer_tokens_total{")]
        if expected_names <= names and sum(float(line.split()[-1]) for line in metric_lines) >= 5:
            break
        assert time.monotonic() < deadline, [line for line in text.splitlines() if "mhmoe" in line]
        time.sleep(0.5)
    assert 'model="tiny-abc123"' in metric_lines[0]
    assert 'application="tiny"' in metric_lines[0]


def test_killed_replica_loses_only_its_own_requests(port, client, checkpoint):
    """If one of two replicas is killed, only its running requests fail, with status 503 and the code `lost`.

    All others are answered, also those that come while a new replica starts.
    """
    deploy([application_config("tiny", checkpoint, TWO, "tiny-abc123")])
    wait_for_status("tiny", "RUNNING")
    body = {"prompt": "the quick", "temperature": 0, "max_tokens": 40}
    expected = complete(client, **body)["choices"]
    killed = threading.Event()

    def ask():
        if killed.is_set():
            # The clients slow down, because the replica that starts in place of the killed one needs a core.
            time.sleep(0.3)
        return client.post("/v1/completions", json=body)

    with run_clients(ask) as answers:
        time.sleep(1)
        [victim, _] = application_details("tiny")["deployments"][DEPLOYMENT]["replicas"]
        os.kill(victim["pid"], signal.SIGKILL)
        killed.set()
        deadline = time.monotonic() + 120
        while victim["replica_id"] in (replica_ids := running_replicas("tiny")) or len(replica_ids) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
    lost_answers = [a for a in answers if a.status_code != 200]
    assert len(lost_answers) <= 4  # each of the four clients has one request at a time
    assert [(a.status_code, a.json()["error"]["code"]) for a in lost_answers] == [(503, "lost")] * len(lost_answers)
    assert all(a.json()["choices"] == expected for a in answers if a not in lost_answers)


@pytest.mark.slow
def test_autoscaling_follows_the_number_of_requests(client, checkpoint):
    elastic_spec = SPEC.model_copy(update={"replicas": WorkerRange(min=1, max=2), "max_concurrency": 1})
    config = application_config("tiny", checkpoint, elastic_spec, "tiny-abc123")
    scaling = config["deployments"][0]["autoscaling_config"]
    assert scaling == {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    # The delays are shortened: by default Ray waits half a minute before it adds a replica, and ten minutes before it
    # removes one.
    scaling |= {"upscale_delay_s": 1, "downscale_delay_s": 2, "look_back_period_s": 20}
    deploy([config])
    wait_for_status("tiny", "RUNNING")

    def wait_for_replicas(replicas):
        deadline = time.monotonic() + 120
        while len(running_replicas("tiny")) != replicas:
            assert time.monotonic() < deadline
            yield

    assert len(running_replicas("tiny")) == 1
    with ThreadPoolExecutor(6) as pool:
        for _ in wait_for_replicas(2):
            list(pool.map(lambda seed: complete(client, seed=seed, max_tokens=40), range(12)))
    for _ in wait_for_replicas(1):
        time.sleep(0.2)
    assert complete(client, max_tokens=5)["usage"]["completion_tokens"] == 5


def test_rate_limits_hold_over_all_replicas(port, checkpoint):
    deploy([application_config("tiny", checkpoint, TWO, "tiny-abc123")])
    wait_for_status("tiny", "RUNNING")
    assert len(running_replicas("tiny")) == 2

    def ask(key, max_tokens):
        body = {"prompt": "the", "max_tokens": max_tokens, "temperature": 0}
        return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=bearer(key), timeout=30)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(LIMITED, 1), range(12)))
    # Six requests are answered, and a seventh if the requests take more than ten seconds.
    assert [response.status_code for response in answers].count(200) in (6, 7)
    refusal = next(response for response in answers if response.status_code == 429)
    assert refusal.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refusal.headers["retry-after"]) <= 11
    assert ask(TALKER, 40).status_code == 200
    deadline = time.monotonic() + 30
    # Replicas do not wait until the rate limiter has counted their tokens, so a few more requests may be answered.
    while (refusal := ask(TALKER, 1)).status_code == 200:
        assert time.monotonic() < deadline
    assert "all its tokens" in refusal.json()["error"]["message"]


@contextmanager
def unfinished_bodies(port, count, key):
    """Send the beginnings of requests with an API key over as many connections, and keep these open in the block."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 90\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(head.encode() + b'{"prompt":')
        yield


@pytest.mark.parametrize("key", ["unknown", TALKER])
def test_unfinished_bodies_of_one_client_leave_others_their_answers(port, checkpoint, key):
    spec = SPEC.model_copy(update={"max_concurrency": 2, "max_waiting": 2})
    config = application_config("tiny", checkpoint, spec, "tiny-abc123")
    deploy([config])
    wait_for_status("tiny", "RUNNING")
    [options] = config["deployments"]
    count = options["max_ongoing_requests"] + options["max_queued_requests"] + 50
    body, url = {"prompt": "the", "max_tokens": 1}, f"http://127.0.0.1:{port}/v1/completions"
    with unfinished_bodies(port, count, key):
        # Other clients may have to wait until slow bodies are refused, but not until they time out.
        deadline = time.monotonic() + BODY_SECONDS / 2
        while (answer := httpx.post(url, json=body, headers=bearer(FREE), timeout=BODY_SECONDS)).status_code != 200:
            assert (answer.status_code, time.monotonic() < deadline) == (429, True)
            time.sleep(0.2)
        assert time.monotonic() < deadline


def test_adapters_come_and_go_while_the_same_replica_answers(port, checkpoint, tmp_path):
    adapters = {name: save_adapter(tmp_path / name, seed) for seed, name in enumerate(("ann", "bob"))}
    spec = ServeSpec(max_tokens=40, max_adapters=2)

    def deploy_adapters(*names):
        chosen_adapters = {name: adapters[name] for name in names}
        deploy([application_config("adapted", checkpoint, spec, "tiny-abc123", "/adapted", adapters=chosen_adapters)])

    with httpx.Client(base_url=f"http://127.0.0.1:{port}/adapted", timeout=30) as client:

        def wait_for_models(*names):
            deadline = time.monotonic() + 60
            while [model["id"] for model in client.get("/v1/models").json()["data"]] != ["tiny-abc123", *names]:
                assert time.monotonic() < deadline
                time.sleep(0.1)

        deploy_adapters("ann")
        wait_for_status("adapted", "RUNNING")
        replicas = running_replicas("adapted")
        expected = {name: complete(client, model=name)["choices"] for name in ("tiny-abc123", "ann")}
        assert expected["tiny-abc123"] != expected["ann"]
        with run_clients(lambda: (complete(client)["choices"], complete(client, model="ann")["choices"])) as answers:
            deploy_adapters("ann", "bob")
            wait_for_models("ann", "bob")
            assert complete(client, model="bob")["choices"] not in expected.values()
        assert answers
        assert all(answer == tuple(expected.values()) for answer in answers)
        deploy_adapters("bob")
        wait_for_models("bob")
        assert client.post("/v1/completions", json={"prompt": "the", "model": "ann"}).status_code == 404
        wait_for_status("adapted", "RUNNING")
        assert running_replicas("adapted") == replicas


def test_unservable_checkpoint_fails_in_one_line(client, checkpoint):
    missing_checkpoint = checkpoint.with_name("step_00000099.1")
    good_config = application_config("tiny", checkpoint, TWO, "tiny-abc123")
    bad_config = application_config("missing", missing_checkpoint, SPEC, "missing")
    # An earlier test may have replaced this application.
    deploy([good_config])
    wait_for_status("tiny", "RUNNING")
    deploy([good_config, {**bad_config, "route_prefix": "/missing"}])
    wait_for_status("missing", "DEPLOY_FAILED")
    reason = f"checkpoint {missing_checkpoint}: it has no readable manifest.json; use another checkpoint of the run"
    assert application_details("missing")["message"].splitlines()[1:] == [reason]
    if find_spec("vllm") is None:
        vllm_config = application_config("absent", checkpoint, SPEC.model_copy(update={"engine": "vllm"}), "absent")
        deploy([good_config, {**vllm_config, "route_prefix": "/absent"}])
        wait_for_status("absent", "DEPLOY_FAILED")
        [_, reason] = application_details("absent")["message"].splitlines()
        assert reason.startswith("engine vllm: vLLM is not installed; install vllm where replicas run")
    assert client.get("/health").status_code == 200
