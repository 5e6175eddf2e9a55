"""Test of fine-tuning as users do it: train a base model, tune it on conversations, and send it held-out prompts."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from tests.cli.run import mhmoe

JOBS = Path(__file__).parents[1] / "jobs"
HELD_OUT = "data/sample/chat/held-out/english"
PROMPTS = 100
MAX_TOKENS = 64

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def held_out_prompts(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Return the first messages of held-out conversations, in the order of the files and without repetitions.

    Only messages are returned whose true answer is shorter than `MAX_TOKENS`, because the model learns to end its
    answers where true answers end.
    """
    prompts: dict[str, None] = {}
    for path in sorted((folder / HELD_OUT).glob("*")):
        with pa.input_stream(str(path)) as stream:
            for line in stream.read().decode().splitlines():
                question, answer = (message["content"] for message in json.loads(line)["messages"][:2])
                if len(tokenizer.encode(answer)) < MAX_TOKENS:
                    prompts[question] = None
    return list(prompts)


def finish_reason(url: str, prompt: str) -> str:
    """Return the reason why the greedy answer of the server to a prompt ended, after at most `MAX_TOKENS` tokens."""
    request = {"messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS, "temperature": 0}
    response = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=300)
    reason: str = response.raise_for_status().json()["choices"][0]["finish_reason"]
    return reason


def test_a_tuned_model_predicts_and_ends_answers_that_it_has_not_read(tmp_path, local_cluster, unused_port):
    assert mhmoe(tmp_path, "data", "sample", "data/sample").code == 0
    for name in ("chat-base", "chat"):
        result = mhmoe(tmp_path, "submit", str(JOBS / f"{name}.yaml"))
        assert result.code == 0, result.err
    text = ("--text", HELD_OUT, "--set", "data.sources.english.format=chat", "--json")
    base_loss, tuned_loss = (
        mhmoe(tmp_path, "eval", run, *text).json()["figures"]["total"]["all"]["loss"]
        for run in ("chat-base", "chat-tuned")
    )
    assert tuned_loss < base_loss - 0.5
    [tokenizer_file] = tmp_path.glob("runs/chat-tuned-*/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    port = ("--set", f"serve.port={unused_port}")
    deployed = mhmoe(tmp_path, "serve", "deploy", "chat-tuned", "--name", "chat", *port)
    assert deployed.code == 0, deployed.err
    try:
        with ThreadPoolExecutor(8) as threads:
            ask = partial(finish_reason, f"http://127.0.0.1:{unused_port}/chat")
            reasons = list(threads.map(ask, held_out_prompts(tmp_path, tokenizer)[:PROMPTS]))
    finally:
        mhmoe(tmp_path, "serve", "down", "chat")
    assert len(reasons) == PROMPTS
    assert reasons.count("stop") >= 95
