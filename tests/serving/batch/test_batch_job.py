"""Tests of `mhmoe generate --input` on a real cluster, with processes that are killed."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.batch.output import BatchOutput
from mhmoe_ray.serving.batch.pipeline import CHUNK_RETRIES
from mhmoe_ray.serving.batch.rows import AnswerCounts
from tests.cli.run import assert_one_line, command, mhmoe
from tests.faults.harness import kill
from tests.support.watch import end_by_ctrl_c, wait_until

from ..conftest import build_model, save_checkpoint
from .conftest import GREEDY, answer_here, make_request, read_output, served, served_texts, write_input
from .killing import chunk_count, kill_driver, running_job, suspend_new_workers, worker_pids

ROWS, CHUNK_ROWS = 200, 8
OPTIONS = ("--max-tokens", "24", "--temperature", "0")


def generate_words(run, path: Path, folder: Path, *options: str) -> list[str]:
    """Return the arguments of a command that writes the answers to the rows of a file into a folder."""
    return ["generate", str(run.path), "--input", str(path), "--output", str(folder), *options]


def start(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """Start a command in `folder`, without waiting for its end."""
    return subprocess.Popen(
        command(*words),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore SIGINT, and the child would inherit this, so Ctrl-C would not end it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_answers_survive_the_death_of_a_worker_and_of_the_driver(tmp_path, local_cluster, batch_run, server):
    """Every row is answered once, in the order of the input, with the answer of the server."""
    prompts = [f"the quick {i}" for i in range(ROWS)]
    path = write_input(tmp_path / "in.jsonl", [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)])
    folder = tmp_path / "out"
    words = generate_words(batch_run, path, folder, *OPTIONS, "--chunk-rows", str(CHUNK_ROWS))
    first_command = start(tmp_path, [*words, "--workers", "2"])
    try:
        job = running_job(folder)
        killed_worker, other_worker = suspend_new_workers(job, 2)
        kill(killed_worker, signal.SIGCONT)
        wait_until(lambda: chunk_count(folder), "the first answers")
        kill(killed_worker)
        count = chunk_count(folder)
        [new_worker] = suspend_new_workers(job, 1, known_pids=(killed_worker, other_worker))
        kill(new_worker, signal.SIGCONT)
        wait_until(lambda: chunk_count(folder) > count, "answers of the worker that replaces it")
        # The other worker is still suspended with its chunks, so the job has not ended yet.
        kill_driver(job)
        kill(other_worker, signal.SIGCONT)
        err = first_command.communicate(timeout=120)[1]
    finally:
        first_command.kill()
    assert first_command.returncode == 9, err
    assert err.splitlines()[-1].startswith(f"error: answers in {folder}: ")
    assert err.splitlines()[-1].endswith("; give the command again: it continues with the chunks that are missing")
    wait_until(lambda: not worker_pids(job), "the end of the workers")
    count = chunk_count(folder)
    assert 1 < count < ROWS // CHUNK_ROWS
    assert not (folder / "_summary.json").exists()
    [checkpoint] = batch_run.checkpoints.iterdir()
    assert checkpoint.name in events.checkpoints_in_use(events.read(batch_run))
    # The job of the second command goes on after Ctrl-C ends that command, and the third command follows the job.
    second_command = start(tmp_path, words)
    try:
        assert any("rows are answered; starting 1 worker" in line for line in second_command.stderr)
        # With a suspended worker, the job cannot end before the command does.
        [worker] = suspend_new_workers(running_job(folder), 1)
        err = end_by_ctrl_c(second_command)
        kill(worker, signal.SIGCONT)
    finally:
        second_command.kill()
    assert second_command.returncode == 0, err
    assert "to end it: mhmoe generate --output" in err
    result = mhmoe(tmp_path, *words, "--json")
    assert result.json() == {"output": str(folder), **json.loads((folder / "_summary.json").read_text())}
    rows = read_output(folder)
    assert [(row["id"], row["prompt"]) for row in rows] == list(enumerate(prompts))
    assert [row["text"] for row in rows] == served_texts(server, prompts, max_tokens=24, temperature=0)
    assert result.json()["rows"] == ROWS
    assert result.json()["tokens"] == sum(row["tokens"] for row in rows)
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith("chunk-")) == [
        "_request.json",
        "_summary.json",
    ]
    mtimes = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    finished_result = mhmoe(tmp_path, *words)
    assert "all rows are answered already" in finished_result.err
    assert f"{ROWS} rows with {result.json()['prompt_tokens']:,} tokens are answered" in finished_result.out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == mtimes
    assert_one_line(mhmoe(tmp_path, *words, "--seed", "1"), 4, "it is for another request: seed none, not 1")


@pytest.mark.ray
@pytest.mark.long
def test_parquet_with_prompts_and_conversations(tmp_path, local_cluster, batch_run, server):
    """A job answers both kinds of rows, carries the other columns, and reports rows without an answer."""
    messages = [{"role": "user", "content": "the quick"}]
    table = pa.table(
        {
            "key": pa.array([b"a", b"b", None, b"d"]),
            "prompt": ["lazy", None, "the quick brown fox " * 40, None],
            "messages": [None, messages, None, [{"role": "critic", "content": "bad"}]],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    words = generate_words(batch_run, tmp_path / "in.parquet", tmp_path / "out", *OPTIONS, "--logprobs", "1")
    result = mhmoe(tmp_path, *words, "--chunk-rows", "3")
    assert result.code == 0, result.err
    assert "generate: 4 of 4 rows" in result.err
    assert "warning: rows without an answer: 2; their column `error` says why" in result.err
    written_table = pq.read_table([tmp_path / "out" / f"chunk-0000000{i}.parquet" for i in range(2)])
    assert written_table.select(table.column_names).equals(table)
    rows = written_table.to_pylist()
    [checkpoint] = batch_run.checkpoints.iterdir()
    run_events = [event for event in events.read(batch_run) if event["output"] == str(tmp_path / "out")]
    assert [(event["event"], event.get("checkpoint")) for event in run_events] == [
        ("answering", checkpoint.name),
        ("answered", None),
    ]
    [choice] = served(server, "/v1/completions", prompt="lazy", max_tokens=24, temperature=0, logprobs=1)["choices"]
    assert rows[0]["text"] == choice["text"]
    assert [entry["logprob"] for entry in rows[0]["logprobs"]] == choice["logprobs"]["token_logprobs"]
    [choice] = served(server, "/v1/chat/completions", messages=messages, max_tokens=24, temperature=0)["choices"]
    assert rows[1]["text"] == choice["message"]["content"]
    assert [row["error"] is None for row in rows] == [True, True, False, False]


@pytest.mark.ray
@pytest.mark.slow
def test_error_of_a_worker_is_one_line_and_a_job_can_be_cancelled(tmp_path, local_cluster, batch_run):
    path = write_input(tmp_path / "in.jsonl", [{"prompt": "a"}] * 2000)
    [weights] = batch_run.checkpoints.glob("*/weights/*")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"x")
    words = generate_words(batch_run, path, tmp_path / "out", *OPTIONS)
    try:
        assert_one_line(mhmoe(tmp_path, *words), 8, "does not have the hash it was written with")
    finally:
        weights.write_bytes(content)
    cancel_words = ["generate", "--output", str(tmp_path / "out"), "--cancel"]
    assert mhmoe(tmp_path, *cancel_words).out == f"no job answers into {tmp_path / 'out'}\n"
    job = mhmoe(tmp_path, *words, "--detach", "--json").json()["job"]
    wait_until(lambda: chunk_count(tmp_path / "out"), "the first answers")
    assert mhmoe(tmp_path, *cancel_words).out.startswith(f"job {job} is ended")
    assert 0 < chunk_count(tmp_path / "out") < 2000 // 128
    assert mhmoe(tmp_path, *words).code == 0
    assert len(read_output(tmp_path / "out")) == 2000


@pytest.mark.ray
@pytest.mark.slow
def test_chunk_that_loses_each_of_its_workers_ends_the_job_in_one_line(tmp_path, local_cluster, batch_run):
    """A row for which the memory does not suffice, for example, must not kill workers without end."""
    # A chunk of so many rows takes longer than each worker lives.
    path = write_input(tmp_path / "in.jsonl", [{"prompt": "a"}] * 20_000)
    process = start(tmp_path, generate_words(batch_run, path, tmp_path / "out", *OPTIONS, "--chunk-rows", "20000"))
    try:
        job = running_job(tmp_path / "out")
        killed_pids: set[int] = set()
        for _ in range(CHUNK_RETRIES + 1):
            [pid] = wait_until(lambda: worker_pids(job) - killed_pids, "a worker")
            time.sleep(2)
            kill(pid)
            killed_pids.add(pid)
        err = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 9, err
    assert err.splitlines()[-1].startswith(
        "error: the workers: a worker died, and so did 5 that computed the same chunk"
    )
    assert "Traceback" not in err


@pytest.mark.long
def test_same_command_continues_with_its_checkpoint_after_a_newer_one(tmp_path, batch_run, lane_home):
    run = RunDir(tmp_path / "tiny-abc123")
    shutil.copytree(batch_run.path, run.path)
    path, output = write_input(tmp_path / "in.jsonl", [{"prompt": "a"}]), BatchOutput(tmp_path / "out")
    [checkpoint] = run.checkpoints.iterdir()
    sampling = GREEDY.model_copy(update={"max_tokens": 24})
    request = make_request(path, checkpoint, sampling)
    output.write_request(request)
    answer_here(request, output.folder)
    output.complete(AnswerCounts(rows=1))
    model = build_model()
    model.embedding.weight.mul_(2)
    newer_checkpoint = save_checkpoint(run.path, 2, model)
    words = generate_words(run, path, output.folder, *OPTIONS)
    assert "all rows are answered already" in mhmoe(tmp_path, *words).err
    old_label = f"checkpoint tiny-abc123/{checkpoint.name} ({request.manifest_sha256[:8]})"
    difference = f"{old_label}, not tiny-abc123/{newer_checkpoint.name}"
    assert_one_line(mhmoe(tmp_path, *words, "--checkpoint", newer_checkpoint.name), 4, difference)
    words[1] = str(newer_checkpoint)
    assert_one_line(mhmoe(tmp_path, *words), 4, difference)


@pytest.mark.long
def test_mistakes_are_one_line_before_a_job_starts(tmp_path, batch_run, lane_home):
    path, folder = tmp_path / "in.jsonl", tmp_path / "out"
    words = generate_words(batch_run, path, folder)
    assert_one_line(mhmoe(tmp_path, *words), 4, f"input {path}: there is no such file")
    path.write_text('{"prompt": "a"}\n{"text": "a"}\n')
    assert_one_line(mhmoe(tmp_path, *words), 4, "line 2: it has neither a 'prompt' nor 'messages' (1 of 2 rows")
    write_input(path, [{"messages": [{"role": "user", "content": "a"}]}])
    template = batch_run.chat_template_file.read_text()
    batch_run.chat_template_file.unlink()
    try:
        assert_one_line(mhmoe(tmp_path, *words), 10, "it has messages, and run tiny-abc123 has no chat template")
    finally:
        batch_run.chat_template_file.write_text(template)
    assert_one_line(mhmoe(tmp_path, *words, "--engine", "fast"), 3, "serve.engine")
    assert_one_line(mhmoe(tmp_path, *words, "--set", "train.lr=1"), 3, "serving does not use it")
    assert_one_line(mhmoe(tmp_path, *words, "--gpus-per-worker", "2"), 3, "gpus_per_replica is 2")
    assert_one_line(mhmoe(tmp_path, *words, "--address", "http://127.0.0.1:1"), 5, "nothing answers there")
    usage_mistakes = {
        ("--input", "a.jsonl"): "name one with --output",
        ("--output", "out"): "name one with --input",
        ("--prompt", "a", "--workers", "2"): "--workers is about a file of prompts",
        ("--prompt", "a", "--input", "a.jsonl"): "give one of them",
        ("--gpus", "1", "--input", "a.jsonl"): "give --gpus-per-worker",
        ("--prompt", "a", "--stop", ""): "an empty text would end every answer",
    }
    for options, message in usage_mistakes.items():
        result = mhmoe(tmp_path, "generate", str(batch_run.path), *options)
        assert (result.code, message in " ".join(result.err.split())) == (2, True), result.err
    assert not folder.exists()
