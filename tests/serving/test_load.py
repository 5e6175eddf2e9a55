import shutil
from typing import Any

import pytest
import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.errors import CheckpointError, ServeError
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.serving.vllm import folder
from mhmoe_ray.spec import ModelSpec, ServeSpec
from tests.serving.conftest import build_model


def test_loaded_model_equals_the_saved_one(checkpoint):
    model, _ = load_model(checkpoint)
    expected = dict(build_model().named_parameters())
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_expert_parallel_checkpoint_loads_as_the_same_model(checkpoint, expert_parallel_checkpoint):
    names = {p.name for p in (expert_parallel_checkpoint / "weights").iterdir()}
    assert len(names) == 2, "each rank writes its own slices"
    expected, loaded = (dict(load_model(c)[0].named_parameters()) for c in (checkpoint, expert_parallel_checkpoint))
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.fixture
def checkpoint_copy(checkpoint, tmp_path):
    """Return a checkpoint in a copy of its run that a test may damage."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent.parent, run)
    return run / "checkpoints" / checkpoint.name


def test_damaged_file_is_named_in_the_error(checkpoint_copy):
    weights = next((checkpoint_copy / "weights").iterdir())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=weights.name):
        load_answerer(checkpoint_copy, ServeSpec())


def test_changed_tokenizer_is_refused(checkpoint_copy):
    tokenizer = checkpoint_copy.parent.parent / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_answerer(checkpoint_copy, ServeSpec())


# The ignored warnings are about Ray's own models, which use what newer releases of pydantic deprecate.
@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
def test_invalid_chat_template_is_refused_before_replicas_start(checkpoint_copy):
    from ray.serve.exceptions import RayServeException

    from mhmoe_ray.serving.app import Args, build

    args = Args(checkpoint=str(checkpoint_copy), model="tiny", serve=ServeSpec())
    build(args)
    (checkpoint_copy.parent.parent / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(RayServeException, match=r"^the chat template: .*; correct chat_template\.jinja"):
        build(args)


VLLM_MODEL: dict[str, Any] = {"vocab_size": 384, "d_model": 384, "layers": 2, "attention_heads": 12, "d_ff": 96}
EXPERTS = {"heads": 2, "experts": 4, "d_expert": 24}


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"qk_norm": "all"}, {"tensor_parallel": 2}, r"qk_norm: all.*set serve\.tensor_parallel=1"),
        ({}, {"tensor_parallel": 5}, r"5 ranks cannot share 12 \(attention_heads\), 96 \(d_ff\), 384 \(vocab_size"),
        ({"vocab_size": 300}, {"tensor_parallel": 3}, r"3 ranks cannot share 320 \(vocab_size, rounded"),
        ({"kv_heads": 4}, {"tensor_parallel": 3}, r"3 ranks cannot share 4 \(kv_heads\)"),
        ({"kv_heads": 2}, {"tensor_parallel": 3}, r"3 ranks cannot share 2 \(kv_heads\)"),
        ({"moe": {**EXPERTS, "d_expert": 25}}, {"tensor_parallel": 2}, r"2 ranks cannot share 25 \(moe\.d_expert\)"),
        ({"moe": {**EXPERTS, "d_shared": 25}}, {"tensor_parallel": 2}, r"2 ranks cannot share 25 \(moe\.d_shared\)"),
        ({}, {"tensor_parallel": 2, "expert_parallel": True}, r"no experts.*set serve\.expert_parallel=false"),
    ],
)
def test_models_that_vllm_cannot_shard_are_refused_by_name(model, settings, message, monkeypatch):
    monkeypatch.setattr(folder, "find_spec", lambda _: True)
    with pytest.raises(ServeError, match=f"^engine vllm: .*{message}"):
        folder.check(ModelSpec.model_validate(VLLM_MODEL | model), ServeSpec(engine="vllm", **settings))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"qk_norm": "all"}, {}),
        ({"qk_norm": "head", "kv_heads": 2}, {"tensor_parallel": 4}),
        ({"kv_heads": 6}, {"tensor_parallel": 3}),
        ({"moe": {**EXPERTS, "d_expert": 25}}, {"tensor_parallel": 2, "expert_parallel": True}),
        ({"moe": EXPERTS}, {"tensor_parallel": 2}),
    ],
)
def test_models_that_vllm_can_shard_are_accepted(model, settings, monkeypatch):
    monkeypatch.setattr(folder, "find_spec", lambda _: True)
    folder.check(ModelSpec.model_validate(VLLM_MODEL | model), ServeSpec(engine="vllm", **settings))


@pytest.mark.parametrize(
    ("moe", "on_cpu", "ranks", "argument_names", "expected_options"),
    [
        (EXPERTS, False, 1, {"moe_backend"}, {"moe_backend": "triton"}),
        (EXPERTS, False, 2, {"moe_backend"}, {"distributed_executor_backend": "mp", "moe_backend": "triton"}),
        (EXPERTS, False, 1, {"model"}, {}),
        (EXPERTS, True, 2, {"moe_backend"}, {"distributed_executor_backend": "mp"}),
        (None, False, 1, {"moe_backend"}, {}),
    ],
)
def test_vllm_gets_kernels_and_an_executor_that_suit_our_model(moe, on_cpu, ranks, argument_names, expected_options):
    model = ModelSpec.model_validate(VLLM_MODEL | {"moe": moe})
    assert folder.engine_options(model, on_cpu, ranks, argument_names) == expected_options


def test_checkpoint_outside_its_run_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "loose" / "step")
    with pytest.raises(CheckpointError, match="inside its run directory"):
        load_answerer(tmp_path / "loose" / "step", ServeSpec())


def test_checkpoint_of_another_model_is_refused(checkpoint_copy):
    manifest = read_manifest(checkpoint_copy)
    model = manifest.model.model_copy(update={"layers": 4})
    (checkpoint_copy / "manifest.json").write_text(manifest.model_copy(update={"model": model}).model_dump_json())
    with pytest.raises(CheckpointError, match="is not in it"):
        load_answerer(checkpoint_copy, ServeSpec())
