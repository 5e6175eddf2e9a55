"""Runs with a checkpoint like those of training, and model folders written by transformers."""

import json
from pathlib import Path

import pytest
import torch

from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.manifest import checkpoint_name, newest_checkpoint
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.support.llama_tokenizer import llama_tokenizer
from tests.support.saved import commit_checkpoint, save_tensors
from tests.support.specs import tiny_spec

SEQ_LEN = 64
TEXT = ["the quick brown fox jumps over the lazy dog", "the dog sleeps and the fox runs over the hill"] * 4
SIZES = {"vocab_size": 320, "d_model": 32, "layers": 2, "attention_heads": 4}
DENSE = {**SIZES, "d_ff": 48}
MIXTRAL = ModelSpec(
    **SIZES,
    kv_heads=2,
    tied_embeddings=False,
    rope_theta=1e6,
    # Masks do not change the logits of a single document, so they equal those of transformers' model, which has no
    # masks.
    document_masks=True,
    moe=MoESpec(heads=1, experts=4, d_expert=24, every=1, normalize_gates=True, z_weight=0.1, jitter=0.01),
)
ALL_FEATURES = {
    "d_expert": 24,
    "d_shared": 16,
    "projection_layers": 3,
    "bias_rate": 0.1,
    "capacity_factor": 2.0,
    "noise": 1.0,
}
MODELS = {
    "llama": ModelSpec(**DENSE, kv_heads=2, moe=MoESpec(**ALL_FEATURES, sub_token_residual=True)),
    "xmoe": ModelSpec(**DENSE, backbone="subln", moe=MoESpec(**ALL_FEATURES, router="xmoe", router_dim=5)),
    "torchscale": ModelSpec(
        **DENSE,
        backbone="subln",
        # Together, the sub-tokens of a token are twice as wide as the token.
        moe=MoESpec(**ALL_FEATURES, router="xmoe_torchscale", heads=4, d_sub_token=16),
    ),
    "dense": ModelSpec(**DENSE, tied_embeddings=False),
    "dense-subln": ModelSpec(**DENSE, backbone="subln"),
    "mixtral": MIXTRAL,
    # This model combines heads with all features of the trunks and routers of other architectures.
    "all": ModelSpec(
        **DENSE,
        d_head=10,
        qk_norm="head",
        attention_bias="qkv",
        rope_scaling={"type": "yarn", "factor": 4, "original_length": 32},
        moe=MoESpec(
            d_expert=24,
            experts=8,
            top_k=3,
            every=1,
            dense_first=1,
            scoring="sigmoid",
            normalize_gates=True,
            gate_scale=2.5,
            groups=4,
            top_groups=2,
            bias_rate=0.1,
        ),
    ),
}
MODEL_TYPES = {"mixtral": "mixtral", "dense": "llama"}
"""Model type in config.json of the models that are not of type `mhmoe`."""


def random_model(spec: ModelSpec) -> Decoder:
    """Return a model with random weights, biases and norms, so that a wrong name shows."""
    model = Decoder(spec).requires_grad_(False).eval()
    init_weights(model, seed=3)
    generator = torch.Generator().manual_seed(5)
    for tensor in model.named_tensors().values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model


def make_run(folder: Path, spec: ModelSpec, seq_len: int = SEQ_LEN) -> RunDir:
    """Write a finished run with a tokenizer and a checkpoint of step 7 below folder/runs, and return it.

    The checkpoint has the weights of `random_model(spec)` and no optimizer state.
    """
    run = create_run(tiny_spec(folder, model=spec.model_dump(), data={"seq_len": seq_len}))
    add_attempt(run, Attempt("job-1", "http://127.0.0.1:9", local=True))
    llama_tokenizer(TEXT, spec.vocab_size).save(str(run.tokenizer_file))
    checkpoint = run.checkpoints / checkpoint_name(7, 1)
    checkpoint.mkdir()
    save_tensors(checkpoint / "weights", random_model(spec).named_tensors())
    fields = {"step": 7, "tokens": 448, "position": 7, "seed": 3, "data_sha256": "0" * 64}
    commit_checkpoint(checkpoint, spec, seq_len=seq_len, **fields)
    events.record(run, "checkpoint", step=7, name=checkpoint.name)
    events.record(run, "finished", step=7)
    return run


def export_run(run: RunDir, target):
    """Export the run's newest checkpoint into the folder `target`, and return the result of the export."""
    checkpoint, manifest, _ = newest_checkpoint(run, ("weights",))
    return export(checkpoint, manifest, target)


def raise_read_error(*_, **__):
    """Raise the error of a failing disk; a replacement for functions that read files."""
    raise OSError(5, "Input/output error")


@pytest.fixture(scope="session")
def mixtral():
    """Return a Mixtral model of transformers with random float32 weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=SEQ_LEN,
        # With this range, the output is far from uniform, so that a wrong weight shows.
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


def save_mixtral(model, folder: Path, **options) -> Path:
    """Save a model of transformers with a tokenizer, and return the folder; `options` are for save_pretrained."""
    model.save_pretrained(folder, **options)
    llama_tokenizer(TEXT, model.config.vocab_size).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def mixtral_folder(mixtral, tmp_path) -> Path:
    return save_mixtral(mixtral, tmp_path / "Mixtral-8x0.1")


def edit_config(**fields):
    """Return a function that sets these fields in the config.json of a folder."""

    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit
