"""Tests of runs on a real cluster, which users start, watch, stop and serve.

tests/test_quickstart.py has a run that is stopped while it trains, and resumed.
"""

import json
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from mhmoe_ray.api.evaluation import EvaluationOptions
from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.cluster import dashboard, tokens
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.spawn import free_ports
from mhmoe_ray.cluster.tokens import state_folder
from mhmoe_ray.evaluate.answer import run_evaluation
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import RunDir, last_attempt
from tests.cli.audit import assert_samples_in_order
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, command, mhmoe
from tests.support.forked import FORKED
from tests.support.watch import LIMIT, end_by_ctrl_c, newest_run

pytestmark = pytest.mark.ray

OLDER_CHECKPOINT, NEWEST_CHECKPOINT = "step_00000020.1", "step_00000030.1"

KEY = "the-key-of-ann-9f3b2c"
KEYS = {"MHMOE_API_KEYS": f"ann:{KEY}", "MHMOE_API_KEY": KEY}
"""Environment variables with the API key of a server and of its client, which commands must not reveal."""


@pytest.fixture(scope="module")
def finished(corpus, local_cluster):
    """Submit a run and follow it to its end; return the run and the result of `mhmoe submit`."""
    result = mhmoe(corpus, "submit", "spec.yaml", **KEYS)
    assert result.code == 0, result.err
    return newest_run(corpus), result


def test_submit_shows_the_plan_the_progress_and_the_end(finished):
    run, result = finished
    assert "workers" in result.out
    for part in (
        "its job runs on",
        "preparing data in",
        "training from step 0 on 2 workers, dp 1 x ep 2",
        "step 20: validation loss",
    ):
        assert part in result.err
    assert result.out.endswith(f"run {run.id} finished at step 30\n")
    assert_samples_in_order(run)


def test_status_list_and_logs_show_a_finished_run(corpus, finished):
    run, _ = finished
    status = mhmoe(corpus, "status", "--json").json()
    assert (status["run"], status["state"], status["last"]["step"]) == (run.id, "finished", 30)
    assert status["checkpoint"]["name"] == NEWEST_CHECKPOINT
    assert status["baselines"]["unigram_entropy"] > 0
    output = mhmoe(corpus, "status", run.id[:7]).out
    for part in ("30 of 30", "perplexity", "unigram entropy", "bigram", "dp 1 x ep 2", "1.00 times the least"):
        assert part in output
    assert [r["run"] for r in mhmoe(corpus, "list", "--json").json()] == [run.id]
    assert run.id in mhmoe(corpus, "list").out
    assert "prepare: packing 3 domains" in mhmoe(corpus, "logs").out
    assert "prepare: packing 3 domains" in mhmoe(corpus, "logs", run.id, "-f").out
    assert mhmoe(corpus, "logs", "--json").json()["job"] == f"{run.id}-1"
    connection = connect()
    job = dashboard.get(connection.address, f"/api/jobs/{run.id}-1", connection.token)
    assert job["metadata"] == {"mhmoe_run": run.id, "mhmoe_path": str(run.path)}


def test_logs_are_filtered_by_rank_time_and_pattern(corpus, finished):
    run, _ = finished
    rank_logs = mhmoe(corpus, "logs", run.id, "--rank", "0")
    assert rank_logs.code == 0, rank_logs.err
    messages = [line.split(" ", 1)[1] for line in rank_logs.out.splitlines() if " INFO " in line]
    assert re.fullmatch(r"rank 0 INFO 2 workers, from step 0 on, process \d+", messages[0])
    assert [line.split(":")[0] for line in messages[1:]] == [f"rank 0 INFO step {step}" for step in (10, 20, 30)]
    [last_line] = mhmoe(corpus, "logs", run.id, "--rank", "0", "--grep", "step 30: .*validation").out.splitlines()
    assert last_line in mhmoe(corpus, "logs", run.id, "--rank", "0", "--since", "1h").out
    assert mhmoe(corpus, "logs", run.id, "--rank", "0", "--since", "2100-01-01").out == ""
    assert "rank 0 INFO step 30: " in mhmoe(corpus, "logs", run.id, "--grep", "step 30").out
    assert "\x1b" not in mhmoe(corpus, "logs", run.id).out
    bad_pattern_result = mhmoe(corpus, "logs", run.id, "--grep", "(")
    assert (bad_pattern_result.code, "it is no regular expression" in bad_pattern_result.err) == (2, True)
    # The run is over, so `--follow` ends at once.
    assert "step 30: " in mhmoe(corpus, "logs", run.id, "--rank", "0", "--follow").out
    bad_pattern_result = mhmoe(corpus, "logs", run.id, "--rank", "2")
    assert (bad_pattern_result.code, "it has ranks 0 to 1" in bad_pattern_result.err) == (7, True)


def test_metrics_are_in_the_files_of_tensorboard(finished):
    from tests.support.event_files import read_scalars

    run, _ = finished
    scalars, lines = read_scalars(run.tensorboard), history.read(run)
    assert [step for step, _ in scalars["loss/training"]] == list(range(1, 31))
    assert [value for _, value in scalars["loss/training"]] == pytest.approx([h[metrics.LOSS] for h in lines], rel=1e-6)
    assert [step for step, _ in scalars["loss/validation"]] == [10, 20, 30]
    assert all(0 < h[metrics.ENTROPY] <= 1 and 0 <= h[metrics.EXCHANGE_WAIT] < 1 for h in lines)


def test_checkpoint_is_evaluated_and_its_routes_are_counted(corpus, finished):
    run, _ = finished
    # A job of `mhmoe eval` calls `run_evaluation`. This test calls it without a job, because the test of README's
    # commands starts such a job.
    process = FORKED.Process(target=run_evaluation, args=(EvaluationOptions().request(run, NEWEST_CHECKPOINT), print))
    process.start()
    process.join()
    assert process.exitcode == 0
    evaluated = mhmoe(corpus, "eval", run.id, "--json").json()
    total = evaluated["figures"]["total"]["all"]
    last_line = history.last_line(run)
    assert (total["loss"], total["tokens"]) == (
        pytest.approx(last_line[metrics.VAL_LOSS], rel=1e-6),
        last_line["val_tokens"],
    )
    assert evaluated["figures"]["domains"].keys() == {"web/a", "web/b", "web/c"}
    second_result = mhmoe(corpus, "eval", run.id)
    assert "it was evaluated before" in second_result.err
    assert "bits/byte" in second_result.out
    routing_report = mhmoe(corpus, "routing", run.id, "--text", "raw/a/one.jsonl", "--samples", "20", "--json").json()
    assert routing_report["tokens"] == 20 * 16
    assert [line["step"] for line in routing_report["training"]][-1] == 30
    assert all(sum(layer["load"]) == pytest.approx(4) for layer in routing_report["layers"])
    assert "heads agree" in mhmoe(corpus, "routing", run.id, "--text", "raw/a/one.jsonl", "--samples", "20").out
    assert len(list((run.path / "evaluations").iterdir())) == 2
    assert_one_line(mhmoe(corpus, "eval", run.id, "--text", "nowhere"), 4, "nowhere")
    reported = mhmoe(corpus, "report", run.id, "--to", "out", "--json").json()
    assert reported["verdicts"] == []
    assert (corpus / "out" / "report.html").stat().st_size > 10_000


# Faster tests cover the two parts: tests/evaluate/test_harness.py covers the unknown task, and tests/cli/test_errors.py
# covers the error of a job.
@pytest.mark.slow
def test_unknown_lm_eval_task_is_one_line_of_the_job(corpus, finished):
    result = mhmoe(corpus, "eval", finished[0].id, "--tasks", "no-such-task")
    assert_one_line(result, 3, "task no-such-task", "lm-eval has no task of this name")


def test_finished_run_is_neither_stopped_nor_resumed(corpus, finished):
    run, _ = finished
    assert_one_line(mhmoe(corpus, "stop", run.id), 7, "it is finished already")
    assert_one_line(mhmoe(corpus, "resume", run.id), 7, "it is finished")
    assert_one_line(mhmoe(corpus, "resume", run.id, "--set", "train.lr=1"), 3, "change only cluster keys")


@pytest.mark.slow  # tests/cli/test_errors.py has a run that fails in its job
def test_failed_run_shows_its_reason_in_one_line(corpus, local_cluster):
    """The worker's own reason, a gradient that is not finite, must reach the command line."""
    write_spec(corpus, train={"lr": 1e30, "min_lr": 0}, cluster={"workers": 1, "ep": 1, "max_failures": 0})
    result = mhmoe(corpus, "submit", "spec.yaml")
    assert result.code == 9
    last_line = result.err.splitlines()[-1]
    assert last_line.startswith("error: run tiny-")
    assert "is not finite" in last_line
    assert "Traceback" not in result.err
    assert mhmoe(corpus, "status", "--json").json()["state"] == "failed"
    assert "is not finite" in mhmoe(corpus, "status").out.replace("\n", " ")


def test_run_is_stopped_before_it_trains(corpus, local_cluster):
    write_spec(corpus, train={"steps": 1000})
    follower = subprocess.Popen(
        command("submit", "spec.yaml"),
        cwd=corpus,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore SIGINT, and the child would inherit this, so Ctrl-C would not end it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert any(line.startswith("its job runs on ") for line in follower.stderr)
        err = end_by_ctrl_c(follower)
    finally:
        follower.kill()
    run = newest_run(corpus)
    hint = f"detached; the run goes on. See: mhmoe status {run.id}; to end it: mhmoe stop {run.id}"
    assert (follower.returncode, err.splitlines()[-1]) == (0, hint)
    stop_result = mhmoe(corpus, "stop", run.id)
    assert stop_result.out == f"run {run.id} stopped\n", stop_result
    assert mhmoe(corpus, "status", run.id, "--json").json()["state"] == "stopped"
    # The workers may have started while the command connected.
    assert not history.read(run) or events.newest_event(events.read(run), "started")
    continue_result = mhmoe(corpus, "submit", "spec.yaml", "--continue", "--detach")
    assert continue_result.code == 0, continue_result.err
    assert f"resuming run {run.id}" in continue_result.err
    assert newest_run(corpus).id == run.id
    second_result = mhmoe(corpus, "submit", "spec.yaml", "--continue", "--detach")
    assert (second_result.code, second_result.err) == (0, f"run {run.id} is running\n")
    assert mhmoe(corpus, "stop", run.id, "--now").code == 0
    write_spec(corpus, train={"steps": 999})
    assert_one_line(mhmoe(corpus, "submit", "spec.yaml", "--continue"), 7, "its spec differs in train")


@pytest.fixture(scope="module")
def served_run(corpus, finished):
    """Serve a checkpoint to clients that have the key, and update it to the newest one.

    During the update a client sends requests, which must all succeed. The cluster has no room for the replicas of both
    checkpoints, so requests wait meanwhile. Yield the URL and the result of `mhmoe serve deploy`.
    """
    run, _ = finished
    port = free_ports(1)[0]
    keys = (f"serve.port={port}", "serve.cpus_per_replica=5", "serve.surge=false")
    sets = [word for key in keys for word in ("--set", key)]
    result = mhmoe(corpus, "serve", "deploy", run.id, "--checkpoint", OLDER_CHECKPOINT, *sets, **KEYS)
    try:
        assert result.code == 0, result.err
        assert f"deploying {OLDER_CHECKPOINT} of {run.id}" in result.err
        url = f"http://127.0.0.1:{port}"
        with requests_in_background(url) as statuses:
            updated = mhmoe(corpus, "serve", "update")
        assert (updated.code, updated.out) == (0, f"serving {NEWEST_CHECKPOINT}\n"), updated.err
        assert set(statuses) == {200}
        assert mhmoe(corpus, "serve", "update").out == f"{NEWEST_CHECKPOINT} is the newest checkpoint, and is served\n"
        yield url, result
    finally:
        down_result = mhmoe(corpus, "serve", "down")
    assert down_result.code == 0
    assert mhmoe(corpus, "serve", "status", "--json").json() == []


@contextmanager
def requests_in_background(url):
    """Send completion requests one after another during the block; yield a list that collects the status codes."""
    stop_event, statuses = threading.Event(), []

    def send_requests():
        body, header = {"prompt": "the moon", "max_tokens": 4}, {"Authorization": f"Bearer {KEY}"}
        while not stop_event.is_set():
            statuses.append(httpx.post(f"{url}/v1/completions", json=body, headers=header, timeout=LIMIT).status_code)

    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(send_requests)
        try:
            yield statuses
        finally:
            stop_event.set()
    client.result()


def test_checkpoint_is_served_by_one_process(corpus, finished, served_run):
    run, _ = finished
    url, deploy_result = served_run
    assert f"serving {run.id} at {url}/v1/completions" in deploy_result.out
    body = {"prompt": "the moon rises", "max_tokens": 8, "temperature": 0}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        plain = client.post("/v1/completions", json=body).json()
        assert plain["usage"]["completion_tokens"] == 8
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        streamed = "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])
        assert streamed == plain["choices"][0]["text"] == greedy_text(run, "the moon rises", 8)
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == [run.id]
        assert client.get("/health").status_code == 200
    [application] = mhmoe(corpus, "serve", "status", "--json").json()
    assert (application["name"], application["status"], application["url"]) == ("mhmoe", "RUNNING", url)
    assert "RUNNING" in mhmoe(corpus, "serve", "status").out


@torch.no_grad()
def greedy_text(run: RunDir, prompt: str, count: int) -> str:
    """Return the greedy continuation of `prompt` by `count` tokens, computed by the model without cache or server."""
    from mhmoe_ray.data.tokenizer import END_OF_TEXT, load_tokenizer

    model, manifest = load_model(run.checkpoints / NEWEST_CHECKPOINT)
    tokenizer = load_tokenizer(run.tokenizer_file, manifest.model.vocab_size)
    ids = [tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(prompt).ids]
    start = len(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits_BTV[0, -1].argmax()))
    return tokenizer.decode(ids[start:])


def test_no_secret_is_in_a_log_a_run_directory_or_a_command_line(corpus, local_cluster, finished, served_run):
    """The secrets are the cluster's token and a client's key; the commands of this test and its fixtures use both."""
    run, submit_result = finished
    url, deploy_result = served_run
    for key, status in ((KEY, 200), ("wrong", 401)):
        body, header = {"prompt": "the moon", "max_tokens": 4}, {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=header).status_code == status
    verbs = (f"status {run.id}", "list", f"logs {run.id}", "serve status", "cluster status", "doctor")
    results = [submit_result, deploy_result, *(mhmoe(corpus, *verb.split(), **KEYS) for verb in verbs)]
    # Every user of the machine can list the command lines with ps, so they must not contain a secret.
    command_lines = "\n".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    assert "ServeReplica" in command_lines
    secrets = {"the cluster's token": tokens.own_token().value, "a client's key": KEY}
    folders = [local_cluster.folder, run.path, state_folder()]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and p != tokens.token_file()]
    assert len(files) > 50
    assert any("dashboard" in p.name for p in files)
    for secret_name, secret in secrets.items():
        leaking_lines = [
            f"{p}: {line.decode(errors='replace').replace(secret, 'SECRET')}"
            for p in files
            for line in _read(p).splitlines()
            if secret.encode() in line
        ]
        assert "\n".join(leaking_lines) == "", f"{secret_name} is in a file"
        assert secret not in command_lines, f"{secret_name} is in a command line"
        assert not [s for s in results if secret in s.out + s.err], f"{secret_name} was printed"


def _read(path: Path) -> bytes:
    """Return the content of a file, or nothing if it cannot be read."""
    try:
        return path.read_bytes()
    # The file may have been removed since it was listed.
    except OSError:
        return b""


def test_log_of_a_run_outlives_the_cluster(corpus, finished):
    run, _ = finished
    cluster_logs = mhmoe(corpus, "logs", run.id)
    assert cluster_logs.err == ""
    text = run.attempts_file.read_text()
    try:
        run.attempts_file.write_text(text.replace(last_attempt(run).address, "http://127.0.0.1:9"))
        stored_logs = mhmoe(corpus, "logs", run.id)
        assert f"from {run.path}/logs" in stored_logs.err
        assert stored_logs.out.splitlines() == cluster_logs.out.splitlines()
        rank_lines = mhmoe(corpus, "logs", run.id, "--rank", "1").out.splitlines()
        assert rank_lines
        assert {line for line in rank_lines if line} <= {
            line.partition(") ")[2] for line in cluster_logs.out.splitlines()
        }
    finally:
        run.attempts_file.write_text(text)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("gpus_per_worker=1", "it needs 2 workers with 1 CPU and 1 GPU each, and the cluster has no GPU"),
        ("domain_label=rack", "has the label rack; correct it, leave it out, or start nodes with `ray start --labels`"),
    ],
)
def test_run_for_which_the_cluster_has_no_place_is_refused_at_once(corpus, setting, reason):
    previous_runs = sorted(corpus.glob("runs/*"))
    start_time = time.monotonic()
    result = mhmoe(corpus, "submit", "spec.yaml", "--set", f"cluster.{setting}")
    # The command takes 5 s on a machine where nothing else runs; the limit allows for a busy machine.
    assert time.monotonic() - start_time < 30
    assert_one_line(result, 5, reason)
    assert sorted(corpus.glob("runs/*")) == previous_runs


@pytest.mark.slow  # among the faster tests, tests/test_old_run.py resumes a run
def test_a_finished_run_is_trained_longer(corpus, finished):
    # Other tests expect the run to have 30 steps, so this test is the last one of the file.
    run, _ = finished
    first_losses = [line[metrics.LOSS] for line in history.read(run)]
    result = mhmoe(corpus, "resume", run.id, "--until", "34")
    assert result.code == 0, result.err
    assert "training from step 30 on 2 workers" in result.err
    losses = [line[metrics.LOSS] for line in history.read(run)]
    assert (len(losses), losses[:30]) == (34, first_losses)
    assert_samples_in_order(run)
    assert mhmoe(corpus, "status", run.id, "--json").json()["state"] == "finished"
