"""Tests of plans of other tools' models: counts equal those of transformers, and what cannot be planned is named."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mhmoe_ray.checkpoint.huggingface.config import read_planned_model
from mhmoe_ray.planner.sizes import compute_sizes
from tests.cli.run import assert_one_line, mhmoe

LITE = {"num_hidden_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16}
CONFIGS = [
    ("deepseek_v3", {}, 671_026_404_352),
    ("deepseek_v2", {**LITE, "q_lora_rank": None, "num_experts_per_tok": 6, "first_k_dense_replace": 1}, None),
    ("gpt_oss", {}, 116_829_156_672),
    ("qwen2_moe", {}, None),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "head_dim": 128}, None),
]


def write_config(folder, model_type, **changes):
    fields = AutoConfig.for_model(model_type, **changes).to_dict() | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(fields, default=str))


@pytest.mark.parametrize(("model_type", "changes", "published_count"), CONFIGS)
def test_counts_equal_those_of_transformers_and_the_similar_model_is_near(
    tmp_path, model_type, changes, published_count
):
    write_config(tmp_path, model_type, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes))
    planned = read_planned_model(tmp_path)
    assert planned.counts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert published_count in (None, planned.counts.parameters)
    sizes = compute_sizes(planned.model)
    assert sizes.parameters == pytest.approx(planned.counts.parameters, rel=0.002)
    assert sizes.active_parameters == pytest.approx(planned.counts.active_parameters, rel=0.01)


def test_command_plans_training_upcycling_and_serving(tmp_path):
    write_config(tmp_path, "deepseek_v3")
    words = ("plan", "--hf", str(tmp_path), "--nodes", "16", "--gpus", "8")
    plan = mhmoe(tmp_path, *words, "--json").json()
    assert (plan["approximated"], plan["parameters"]) == (True, 671_026_404_352)
    assert plan["serving"]["cache_bytes_per_token"] == 2 * 61 * (512 + 64)
    ways = plan["ways"]
    assert list(ways) == ["train or fine-tune", "upcycle to MH-MoE, h 2", "upcycle to MH-MoE, h 4"]
    hours = [way["gpu_hours"][1] for way in ways.values() if "problem" not in way]
    assert hours == sorted(hours)
    assert "train or fine-tune" in mhmoe(tmp_path, *words).out


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "mamba"}, "its model_type is mamba"),
        ({"model_type": "deepseek_v3", "hidden_size": 64}, "vocab_size: Field required"),
        ({"model_type": "llama", "hidden_size": 64}, "vocab_size: Field required"),
    ],
)
def test_what_cannot_be_planned_is_named(tmp_path, fields, reason):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert_one_line(mhmoe(tmp_path, "plan", "--hf", ".", "--nodes", "1", "--gpus", "8"), 8, reason)
