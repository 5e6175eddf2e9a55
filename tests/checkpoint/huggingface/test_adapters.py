"""Tests of adapters: random models of transformers are imported, compute the same, and are exported again."""

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from safetensors.torch import load_file

from mhmoe_ray.checkpoint.huggingface.adapters import ADAPTERS, choose_adapter, computed_function
from mhmoe_ray.checkpoint.huggingface.adapters.mhmoe import MhmoeAdapter
from mhmoe_ray.checkpoint.huggingface.config import build_config
from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.checkpoint.huggingface.conftest import MODELS, SEQ_LEN, TEXT, export_run
from tests.checkpoint.huggingface.strategies import model_specs
from tests.support.llama_tokenizer import llama_tokenizer
from tests.support.paged import logits_in_parts

pytestmark = pytest.mark.long

TOKENS = torch.randint(320, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ_LEN,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # makes the output far from uniform, so that a wrong weight shows
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CASES = {
    "llama": ("Llama", {}),
    "llama, tied, biased, llama3": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, wide heads": ("Llama", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, narrow heads": ("Mistral", {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3, default width, biased": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 12}),
    "qwen3_moe, some layers dense": (
        "Qwen3Moe",
        {**EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [0], "decoder_sparse_step": 2},
    ),
    "olmoe": ("Olmoe", EXPERTS),
    "olmoe, normalized gates": ("Olmoe", {**EXPERTS, "norm_topk_prob": True}),
}
# A Mistral computes what a Llama computes, and the first adapter that expresses a model exports it.
EXPORTED_TYPES = {"mistral": "llama"}


def random_weights(model):
    """Give norms and biases random values, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
    return model.eval()


def weights(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_model_of_transformers_can_be_imported_and_exported(tmp_path, case):
    name, options = CASES[case]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    model = random_weights(getattr(transformers, f"{name}ForCausalLM")(config))
    model.save_pretrained(tmp_path / "theirs")
    llama_tokenizer(TEXT, 320).save(str(tmp_path / "theirs" / "tokenizer.json"))
    run = import_folder(tmp_path / "theirs", None, tmp_path / "runs", None)
    checkpoint, manifest, _ = newest_checkpoint(run, ("weights",))
    with torch.no_grad():
        expected = model(TOKENS).logits
        logits = logits_in_parts(load_model(checkpoint)[0], TOKENS, [SEQ_LEN])
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    export_run(run, tmp_path / "ours")
    original, exported = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)
    model_type = json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"]
    assert model_type == EXPORTED_TYPES.get(config.model_type, config.model_type)
    reloaded_model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(reloaded_model.eval()(TOKENS).logits, expected)
    assert manifest.seq_len == SEQ_LEN


def test_every_adapter_has_a_case():
    assert {getattr(transformers, f"{name}Config").model_type for name, _ in CASES.values()} == ADAPTERS.keys() - {
        "mhmoe"
    }


@settings(max_examples=100)
@given(model_specs())
def test_mhmoe_adapter_expresses_every_model(spec):
    adapter = MhmoeAdapter.from_model(spec, 64)
    assert computed_function(adapter.to_model_spec()) == computed_function(spec)
    chosen_adapter = choose_adapter(spec, 64)
    assert computed_function(chosen_adapter.to_model_spec()) == computed_function(spec)
    assert chosen_adapter.context_length == 64


def test_losses_of_the_router_do_not_keep_a_model_from_being_exported():
    moe = MoESpec(d_expert=24, noise=1.0, balance="importance_load")
    spec = ModelSpec(vocab_size=320, d_model=32, layers=2, attention_heads=4, d_ff=48, moe=moe)
    exported_spec = choose_adapter(spec, SEQ_LEN).to_model_spec()
    assert computed_function(exported_spec) == computed_function(spec)


def test_written_keys_are_read_back():
    """The keys must survive JSON, as they are in config.json."""
    for model in MODELS.values():
        config = json.loads(json.dumps(build_config(model, 64, 300)))
        adapter = ADAPTERS[config["model_type"]].model_validate(config)
        assert computed_function(adapter.to_model_spec()) == computed_function(model)


def test_other_layers_than_the_first_cannot_be_dense(tmp_path):
    config = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1])
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp_only_layers is \[1\]; only the first layers can be dense here"):
        import_folder(tmp_path, None, tmp_path / "runs", None)


def test_clipped_queries_are_refused(tmp_path):
    transformers.OlmoeConfig(**SIZES, **EXPERTS, clip_qkv=8.0).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="clip_qkv"):
        import_folder(tmp_path, None, tmp_path / "runs", None)
