"""Tests of several adapters beside their base in one engine: answers equal those of each adapter alone."""

from dataclasses import replace

import pytest
import torch

from mhmoe_kernels import packed
from mhmoe_kernels.packed import PackedMatrix, PaddedMatrix
from mhmoe_ray.api.adapters import find_adapters
from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.errors import CheckpointError, ServeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import Answerer
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.engine import EngineError, Request, SamplingParams
from mhmoe_ray.serving.engine.packed_model import PackedModel
from mhmoe_ray.serving.engine.scheduler import PREFILL_CHUNK
from mhmoe_ray.serving.engine.torch_engine import TorchEngine, convert_to_bfloat16
from mhmoe_ray.spec import ModelSpec, ServeSpec
from tests.serving.adapters import save_adapter
from tests.serving.asking import answer_all, call
from tests.serving.conftest import SEQ_LEN, SPEC, build_model, save_checkpoint
from tests.serving.prompts import TOKENIZER_SIZE, greedy_tokens, mixed_requests, random_prompts

ALL_TARGETS = ["query", "key", "value", "out", "projections", "feed_forward", "router", "experts"]
SUBLN = ModelSpec.model_validate(
    SPEC.model_dump() | {"backbone": "subln", "moe": SPEC.moe.model_dump() | {"d_shared": 24}}
)
MATRICES = {
    "packed": pytest.param(
        PackedMatrix,
        torch.float32,
        SPEC,
        marks=pytest.mark.skipif(packed.unavailable_reason(torch.float32) is not None, reason="oneDNN packs nothing"),
    ),
    "padded": pytest.param(PaddedMatrix, torch.float32, SPEC),
    "bfloat16": pytest.param(PaddedMatrix, torch.bfloat16, SPEC),
    "subln with a shared expert": pytest.param(PaddedMatrix, torch.float32, SUBLN),
}


def create_engine(matrix=PaddedMatrix, dtype=torch.float32, model=SPEC, seq_len=SEQ_LEN):
    """Return an engine without end tokens, in which 32 requests run at a time."""
    decoder = build_model(model)
    if dtype == torch.bfloat16:
        convert_to_bfloat16(decoder)
    precision = "float32" if dtype == torch.float32 else "bfloat16"
    spec = ServeSpec(max_concurrency=32, max_waiting=1000, max_adapters=2, precision=precision)
    return TorchEngine(decoder, frozenset(), TOKENIZER_SIZE, seq_len, spec, PackedModel(decoder, matrix))


def save_adapters(folder, model=SPEC):
    """Return the checkpoints of two adapters of different ranks, one of them only of some matrices."""
    return {
        "ann": save_adapter(folder / "ann", 1, 4, ALL_TARGETS, model),
        "bob": save_adapter(folder / "bob", 2, 8, ["value", "experts"], model),
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.mark.cpu
@pytest.mark.parametrize(("matrix", "dtype", "model"), MATRICES.values(), ids=list(MATRICES))
def test_mixed_answers_equal_those_of_each_adapter_alone(tmp_path, matrix, dtype, model):
    adapters = save_adapters(tmp_path, model)
    names, requests = ["", "ann", "bob"], mixed_requests()
    # 300 requests: each prompt is asked of the base and of both adapters, and many prompts several times.
    mixed = [replace(requests[i // 3 % len(requests)], adapter=names[i % 3]) for i in range(300)]
    engine = create_engine(matrix, dtype, model)
    try:
        engine.set_adapters(adapters)
        answers = answer_all(engine, mixed)
        assert engine.stats().step_tokens / engine.stats().steps > 8
    finally:
        engine.close()
    for name in names:
        single_engine = create_engine(matrix, dtype, model)
        try:
            single_engine.set_adapters({name: adapters[name]} if name else {})
            own_requests = mixed[names.index(name) :: 3][: len(requests)]
            expected = answer_all(single_engine, own_requests)
        finally:
            single_engine.close()
        for i, answer in enumerate(answers[names.index(name) :: 3]):
            assert answer == expected[i % len(requests)], (name, i)


def test_greedy_answers_equal_those_of_the_merged_model(adapters):
    """Rounding of merged weights changes no token in float32, because no two logits are that close."""
    engine = create_engine()
    try:
        engine.set_adapters(adapters)
        prompts, sampling = random_prompts(6), SamplingParams(max_tokens=12, temperature=0)
        answers = {
            name: answer_all(engine, [Request(ids, sampling, adapter=name) for ids in prompts]) for name in adapters
        }
    finally:
        engine.close()
    for name, checkpoint in adapters.items():
        merged, _ = load_model(checkpoint)
        base_tokens = [greedy_tokens(build_model(), ids, 12) for ids in prompts]
        tokens = [[scored.token for scored in answer.tokens] for answer in answers[name]]
        assert tokens == [greedy_tokens(merged, ids, 12) for ids in prompts]
        assert tokens != base_tokens


def test_adapters_share_no_cached_blocks(adapters):
    engine = create_engine(seq_len=3 * PREFILL_CHUNK)
    ids = tuple(i * i % TOKENIZER_SIZE for i in range(2 * PREFILL_CHUNK))
    requests = [Request(ids, SamplingParams(max_tokens=8, temperature=0), adapter=name) for name in ("", *adapters)]
    try:
        engine.set_adapters(adapters)
        answers = [answer_all(engine, [request])[0] for request in requests]
        assert engine.stats().reused_tokens == 0
        assert answer_all(engine, requests) == answers
        assert engine.stats().reused_tokens == len(requests) * PREFILL_CHUNK
    finally:
        engine.close()


def test_a_removed_adapter_answers_no_new_request_and_a_damaged_one_leaves_the_others(adapters, tmp_path):
    engine = create_engine()
    request = Request(random_prompts(1)[0], SamplingParams(max_tokens=4, temperature=0), adapter="ann")
    try:
        engine.set_adapters(adapters)
        expected = answer_all(engine, [request])
        engine.set_adapters({"bob": adapters["bob"]})
        with pytest.raises(EngineError, match="adapter ann has just been removed"):
            answer_all(engine, [request])
        damaged = save_adapter(tmp_path, 3)
        next((damaged / "weights").iterdir()).write_bytes(b"damaged")
        with pytest.raises(CheckpointError):
            engine.set_adapters({"ann": adapters["ann"], "eve": damaged})
        assert list(engine.adapters) == ["ann"]
        assert answer_all(engine, [request]) == expected
    finally:
        engine.close()


def test_requests_name_an_adapter_as_their_model(answerer, adapters, tokenizer):
    engine = create_engine()
    app = create_app(Answerer(engine, tokenizer, None, answerer.details), "tiny", ServeSpec())
    try:
        engine.set_adapters(adapters)
        models = call(app, "GET", "/v1/models").json()["data"]
        assert [(model["id"], model["parent"]) for model in models] == [
            ("tiny", None), ("ann", "tiny"), ("bob", "tiny"),
        ]  # fmt: skip
        texts = set()
        for model in ("tiny", "ann", "bob"):
            body = {"prompt": "the quick", "temperature": 0, "max_tokens": 12, "model": model}
            response = call(app, "POST", "/v1/completions", json=body)
            answer = response.json()
            assert answer["model"] == model
            weights = engine.adapters[model] if model in adapters else answerer.details.weights
            assert weights.headers.items() <= dict(response.headers).items()
            streamed = call(app, "POST", "/v1/completions", json={**body, "stream": True})
            assert weights.headers.items() <= dict(streamed.headers).items()
            assert weights.digest in streamed.text
            texts.add(answer["choices"][0]["text"])
        assert len(texts) == 3
        refusal = call(app, "POST", "/v1/completions", json={"prompt": "the quick", "model": "eve"})
        assert refusal.status_code == 404
        assert "this server has 'tiny', 'ann', 'bob'" in refusal.json()["error"]["message"]
    finally:
        engine.close()


def test_adapters_of_other_weights_are_refused(checkpoint, expert_parallel_checkpoint, adapters, tmp_path):
    run = RunDir.of_checkpoint(checkpoint)
    assert find_adapters({"ann": str(adapters["ann"])}, checkpoint, run, ServeSpec()) == {"ann": adapters["ann"]}
    # Two ranks divided the same weights.
    assert find_adapters({"ann": adapters["ann"]}, expert_parallel_checkpoint, run, ServeSpec()) == {
        "ann": adapters["ann"]
    }
    other_model = build_model()
    other_model.embedding.weight[0, 0] += 1
    other_checkpoint = save_checkpoint(tmp_path, 1, other_model)
    with pytest.raises(ServeError, match="it was trained on other weights than those of"):
        find_adapters({"ann": adapters["ann"]}, other_checkpoint, run, ServeSpec())
    with pytest.raises(ServeError, match="has all weights of a model"):
        find_adapters({"ann": checkpoint}, checkpoint, run, ServeSpec())
    with pytest.raises(ServeError, match="a name has at most 40 letters"):
        find_adapters({"a/b": adapters["ann"]}, checkpoint, run, ServeSpec())
    with pytest.raises(ServeError, match="the served model itself has this name"):
        find_adapters({run.id: adapters["ann"]}, checkpoint, run, ServeSpec())


@pytest.mark.parametrize(
    ("rank", "targets", "reason"),
    [
        (4, ["query", "router", "experts"], "has no adapters of router and experts.*--merge"),
        (32, ["query"], "its rank is 32, and vLLM has room for 16.*serve.vllm.max_lora_rank"),
    ],
)
def test_adapters_that_vllm_cannot_compute_are_refused(checkpoint, tmp_path, rank, targets, reason):
    adapter = save_adapter(tmp_path, 1, rank, targets)
    with pytest.raises(ServeError, match=f"adapter ann: .*{reason}"):
        find_adapters({"ann": adapter}, checkpoint, RunDir.of_checkpoint(checkpoint), ServeSpec(engine="vllm"))
