"""Tests that vLLM computes each request with its adapter, whatever other requests run beside it."""

from dataclasses import replace

import pytest

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.serving.engine import EngineError, Request, SamplingParams
from mhmoe_ray.spec import MoESpec
from tests.serving.adapters import save_adapter
from tests.serving.asking import answer_all
from tests.serving.conftest import build_model, save_checkpoint
from tests.serving.prompts import greedy_tokens, random_prompts
from tests.serving.vllm.conftest import SPEC, serve_with_vllm

MODEL = SPEC.model_copy(update={"moe": MoESpec(heads=2, experts=4, d_expert=24, d_shared=32, projection_layers=2)})
TARGETS = ["query", "key", "value", "out", "projections", "feed_forward", "shared"]
SAMPLING = SamplingParams(max_tokens=12, temperature=0)


def answers_of(engine, requests):
    return [[scored.token for scored in answer.tokens] for answer in answer_all(engine, requests)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Checkpoints of three adapters of different ranks; the second one's has no keys."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "ann": save_adapter(folder / "ann", 1, 4, TARGETS, MODEL),
        "bob": save_adapter(folder / "bob", 2, 8, ["query", "value", "projections"], MODEL),
        "eve": save_adapter(folder / "eve", 3, 3, TARGETS, MODEL),
    }


def test_mixed_answers_equal_those_of_each_merged_model(run_dir, adapters):
    checkpoint = save_checkpoint(run_dir, 330, build_model(MODEL))
    prompts = random_prompts(25)
    models = {"": build_model(MODEL), **{name: load_model(path)[0] for name, path in adapters.items()}}
    expected = {
        name: [greedy_tokens(model, ids, 12, end_tokens={0}) for ids in prompts] for name, model in models.items()
    }
    assert all(expected[name] != expected[""] for name in adapters)

    def requests(*names):
        return [Request(ids, SAMPLING, adapter=name) for ids in prompts for name in names]

    def expected_answers(*names):
        return [expected[name][number] for number in range(len(prompts)) for name in names]

    with serve_with_vllm(checkpoint, max_adapters=2, max_waiting=1000) as answerer:
        engine = answerer.engine
        engine.set_adapters({name: adapters[name] for name in ("ann", "bob")})
        names = ("", "ann", "bob")
        for _ in range(4):
            assert answers_of(engine, requests(*names)) == expected_answers(*names)
        assert engine.stats().step_tokens / engine.stats().steps > 8
        # The third adapter takes the place of the first one, and then of the second one under its name.
        for checkpoints in ({"bob": "bob", "new": "eve"}, {"ann": "ann", "bob": "eve"}):
            engine.set_adapters({name: adapters[path] for name, path in checkpoints.items()})
            names = ("", *checkpoints)
            assert answers_of(engine, requests(*names)) == expected_answers("", *checkpoints.values())
        with pytest.raises(EngineError, match="adapter new has just been removed"):
            answers_of(engine, [replace(requests("")[0], adapter="new")])
