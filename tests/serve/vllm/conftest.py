"""Tests of this folder run only where vLLM is installed (`make test-vllm`)."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mhmoe_ray.serve.answer import Answerer
from mhmoe_ray.serve.engine import Engine, Request, Sampling
from mhmoe_ray.serve.load import load_answerer
from mhmoe_ray.spec import ModelSpec, MoESpec, ServeSpec
from tests.serve.asking import together
from tests.serve.test_torch_engine import prompts

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# Rows of 32, which vLLM wants on a CPU; experts of a width that it must pad.
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
            # Of vLLM and all that it imports; none of them is ours to mend.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True, scope="session")
def _environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@contextmanager
def served(checkpoint: Path, **settings: object) -> Iterator[Answerer]:
    """Serve the checkpoint with vLLM, and yield the answerer."""
    answerer = load_answerer(checkpoint, ServeSpec(engine="vllm", **{"max_concurrency": 32, **settings}))
    try:
        yield answerer
    finally:
        answerer.engine.close()


GREEDY = Sampling(max_tokens=20, temperature=0)


def greedy_of_32(engine: Engine) -> list[list[int]]:
    """Return the greedy answers to 32 requests that are there at once."""
    asked = [Request(ids, GREEDY) for ids in prompts(32)]
    return [[scored.token for scored in answer.tokens] for answer in together(engine, asked)]
