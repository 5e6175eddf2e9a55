"""Fixtures of the tests with vLLM, which run only where it is installed (`make test-vllm`)."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mhmoe_ray.serving.answer import Answerer
from mhmoe_ray.serving.engine import Engine, Request, SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ModelSpec, MoESpec, ServeSpec
from tests.serving.asking import answer_all
from tests.serving.prompts import random_prompts

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# On a CPU, vLLM needs rows whose width (d_model / moe.heads) is a multiple of 32. This d_expert is deliberately no
# multiple of the size that vLLM needs for it, so that the tests cover experts that have to be padded.
SPEC = ModelSpec(
    vocab_size=320,
    d_model=64,
    layers=2,
    attention_heads=2,
    d_ff=96,
    moe=MoESpec(heads=2, experts=4, d_expert=24),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Warnings are not turned into errors here, because vLLM and the libraries that it imports issue some.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True, scope="session")
def _environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield


@contextmanager
def serve_with_vllm(checkpoint: Path, **settings: object) -> Iterator[Answerer]:
    """Load the checkpoint into vLLM, yield the answerer, and close its engine at the end of the block."""
    answerer = load_answerer(checkpoint, ServeSpec(engine="vllm", **{"max_concurrency": 32, **settings}))
    try:
        yield answerer
    finally:
        answerer.engine.close()


GREEDY = SamplingParams(max_tokens=20, temperature=0)


def greedy_answers(engine: Engine) -> list[list[int]]:
    """Return the greedy answers to 32 requests that are sent at the same time."""
    requests = [Request(ids, GREEDY) for ids in random_prompts(32)]
    return [[scored.token for scored in answer.tokens] for answer in answer_all(engine, requests)]
