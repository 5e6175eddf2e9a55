"""Test of batch inference of 10,000 prompts, during which workers and drivers are killed at random moments."""

import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from mhmoe_ray.cluster.spawn import LocalCluster
from tests.cli.run import command, mhmoe
from tests.faults.harness import kill
from tests.support.watch import wait_until

from .conftest import read_output, served_texts, write_input
from .killing import chunk_count, kill_driver, running_job, worker_pids

SEED = int(os.environ.get("SOAK_SEED", "1"))
ROWS, CHUNK_ROWS, TOKENS, WORKERS = 10_000, 50, 24, 2
WORKER_KILLS_PER_DRIVER, DRIVER_KILLS = 3, 3
CHUNKS_PER_KILL = ROWS // CHUNK_ROWS // (DRIVER_KILLS * (WORKER_KILLS_PER_DRIVER + 1) + 2)
"""Number of chunks between two kills, so that the kills spread over the whole work."""


def kill_workers_and_driver(folder: Path, words: list[str], draws: random.Random) -> None:
    """Start a job that writes answers to a folder, kill some of its workers one after another, and then its driver."""

    def wait_for_chunks() -> None:
        count = chunk_count(folder)
        wait_until(lambda: chunk_count(folder) >= count + CHUNKS_PER_KILL, "more answers")
        time.sleep(draws.uniform(0, 1))

    process = subprocess.Popen(command(*words), cwd=folder.parent, stderr=subprocess.PIPE, text=True)
    try:
        job = running_job(folder)
        for number in range(WORKER_KILLS_PER_DRIVER):
            wait_for_chunks()
            pids = wait_until(lambda: sorted(worker_pids(job)), "a worker")
            assert kill(draws.choice(pids))
            print(f"killed worker {number + 1} with {chunk_count(folder)} chunks", flush=True)
        wait_for_chunks()
        kill_driver(job)
        print(f"killed the driver with {chunk_count(folder)} chunks", flush=True)
        err = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 9, err
    assert "give the command again" in err.splitlines()[-1]
    assert chunk_count(folder) < ROWS // CHUNK_ROWS, "the job must not have ended before the last kill"


@pytest.mark.ray
@pytest.mark.soak
def test_10_000_prompts_survive_kills(tmp_path, local_cluster: LocalCluster, batch_run, server):
    draws, start_time = random.Random(SEED), time.monotonic()
    prompts = [f"the quick {i} {draws.choice(['fox', 'dog', 'größte', '文章'])}" for i in range(ROWS)]
    path = write_input(tmp_path / "in.jsonl", [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)])
    folder = tmp_path / "out"
    words = ["generate", str(batch_run.path), "--input", str(path), "--output", str(folder)]
    words += ["--max-tokens", str(TOKENS), "--temperature", "0"]
    words += ["--workers", str(WORKERS), "--chunk-rows", str(CHUNK_ROWS)]
    for _ in range(DRIVER_KILLS):
        kill_workers_and_driver(folder, words, draws)
    result = mhmoe(tmp_path, *words)
    assert result.code == 0, result.err
    print(f"{result.out.strip()} after {time.monotonic() - start_time:.0f} s", flush=True)
    rows = read_output(folder)
    assert [(row["id"], row["prompt"]) for row in rows] == list(enumerate(prompts))
    assert [row["text"] for row in rows] == served_texts(server, prompts, max_tokens=TOKENS, temperature=0)
    assert {path.name for path in folder.iterdir()} == {
        "_request.json",
        "_summary.json",
        *(f"chunk-{chunk:08d}.jsonl" for chunk in range(ROWS // CHUNK_ROWS)),
    }
