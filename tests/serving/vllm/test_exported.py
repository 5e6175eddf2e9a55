"""Tests that vLLM's own server serves exported folders; its process loads this package only as a plugin."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ModelSpec, MoESpec, ServeSpec
from tests.checkpoint.huggingface.conftest import MODELS, TEXT, export_run, make_run
from tests.serving.asking import answer_tokens
from tests.support.llama_tokenizer import llama_tokenizer
from tests.support.watch import wait_until

# vLLM accepts logit biases for tokens of the tokenizer only, so the models have embeddings of no other tokens.
VOCAB_SIZE = llama_tokenizer(TEXT, 320).get_vocab_size()
SIZES = {"vocab_size": VOCAB_SIZE, "d_model": 64, "layers": 2, "attention_heads": 2}
EXPORTS = {
    "dense": ModelSpec(**SIZES, d_ff=96, tied_embeddings=False),
    "mixtral": MODELS["mixtral"].model_copy(update={**SIZES, "kv_heads": 1}),
    "mhmoe": ModelSpec(**SIZES, d_ff=96, moe=MoESpec(d_expert=24, d_shared=40)),
    "mhmoe, narrow rows": ModelSpec(**SIZES, d_ff=96, moe=MoESpec(heads=4, d_expert=24)),
    "subln": ModelSpec(**SIZES, d_ff=96, backbone="subln", moe=MoESpec(d_expert=24)),
}
REFUSALS = {"mhmoe, narrow rows": "a sub-token has 16 here", "subln": "it has no layers for the subln backbone"}
PROMPTS = ("the quick", "fox 日本")


def start_server(folder, port):
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    options = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "64"]
    with (folder.parent / "server.log").open("w") as log:
        return subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT, env=environment)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def is_ready(server, port):
    assert server.poll() is None, "the server ended"
    try:
        ask(port, "/health")
    except urllib.error.URLError:
        return False
    return True


@pytest.fixture
def folder(tmp_path, request):
    run = make_run(tmp_path, EXPORTS[request.param])
    export_run(run, tmp_path / "out")
    return run, tmp_path / "out"


@pytest.mark.parametrize("folder", [kind for kind in EXPORTS if kind not in REFUSALS], indirect=True)
def test_server_of_vllm_answers_like_our_engine(folder):
    run, path = folder
    port = free_port()
    server = start_server(path, port)
    try:
        wait_until(lambda: is_ready(server, port), "vLLM's server", seconds=240)
        answerer = load_answerer(newest_checkpoint(run, ("weights",))[0], ServeSpec(max_concurrency=1))
        for prompt in PROMPTS:
            biases = {1: -100.0, 2: -100.0}  # tokens that would end the answer
            body = {"model": str(path), "prompt": prompt, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
            answer = json.loads(ask(port, "/v1/completions", {**body, "logit_bias": biases}))
            params = SamplingParams(max_tokens=24, temperature=0, logit_bias=biases)
            expected = answer_tokens(answerer.engine, answerer.encode(prompt), params)
            assert answer["choices"][0]["token_ids"] == expected
            assert answer["usage"]["prompt_tokens"] == len(answerer.encode(prompt))
        answerer.engine.close()
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.parametrize("folder", list(REFUSALS), indirect=True)
def test_server_of_vllm_refuses_a_model_by_name(folder, request):
    _, path = folder
    server = start_server(path, free_port())
    deadline = time.monotonic() + 240
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    server.kill()
    assert server.wait(60) != 0
    kind = request.node.callspec.params["folder"]
    assert REFUSALS[kind] in (path.parent / "server.log").read_text()
