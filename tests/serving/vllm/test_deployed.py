"""Test of a replica of Ray Serve with vLLM as its engine."""

import httpx
import pytest

from mhmoe_ray.serving.config import application_config
from mhmoe_ray.spec import ServeSpec
from tests.serving.conftest import build_model, save_checkpoint
from tests.serving.deployed import deploy, start_ray_serve, wait_for_status
from tests.serving.prompts import greedy_tokens

from .conftest import SPEC

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_replica_answers_with_the_models_tokens(run_dir, tokenizer, ranks):
    model = build_model(SPEC)
    checkpoint = save_checkpoint(run_dir, 400 + ranks, model)
    spec = ServeSpec(engine="vllm", tensor_parallel=ranks, cpus_per_replica=ranks)
    ids = [0, *tokenizer.encode("the quick", add_special_tokens=False).ids]
    with start_ray_serve() as port:
        deploy([application_config("tiny", checkpoint, spec, "tiny-abc123")])
        wait_for_status("tiny", "RUNNING")
        body = {"prompt": "the quick", "temperature": 0, "max_tokens": 20}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            [choice] = client.post("/v1/completions", json=body).json()["choices"]
            assert choice["text"] == tokenizer.decode(greedy_tokens(model, ids, 20, end_tokens={0}))
            [stats] = client.get("/stats").json()["replicas"]
            assert stats["answer_tokens"] > 0
