"""A folder in Hugging Face's format that vLLM loads in place of a checkpoint. This module does not import vLLM."""

import json
from pathlib import Path

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.errors import ServeError
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Location

ARCHITECTURE = "MhmoeForCausalLM"
FORMAT = "mhmoe"
"""Name of the checkpoint format, for `load_format`; also the type of the model in its configuration."""
# vLLM's kernels for experts on a CPU take such widths only.
CPU_MULTIPLE = 32
"""Number of which the width of an expert's rows must be a multiple on a CPU."""


def check_fits(model: ModelSpec, on_cpu: bool) -> None:
    """Check that vLLM has layers for this model.

    Raises:
        ServeError: vLLM has no layers for it.
    """
    fix = "serve it with serve.engine=torch"
    if not model.architecture.runs_in_vllm:
        raise ServeError("engine vllm", f"it has no layers for the {model.backbone} backbone", fix)
    width = model.d_model // model.moe.heads if model.moe else 0
    if on_cpu and width % CPU_MULTIPLE:
        reason = f"on a CPU it computes experts on rows of a multiple of {CPU_MULTIPLE}, and d / h is {width} here"
        raise ServeError("engine vllm", reason, fix)


def write_folder(folder: Path, checkpoint: Location, manifest: CheckpointManifest, tokenizer_size: int) -> None:
    """Write the model's configuration into an empty folder, which vLLM loads with `load_format="mhmoe"`.

    Args:
        folder: the folder, on this machine.
        checkpoint: location of the weights, which are not copied.
        manifest: the checkpoint's manifest.
        tokenizer_size: number of tokens of the tokenizer.
    """
    model = manifest.model
    config = {
        "model_type": FORMAT,
        "architectures": [ARCHITECTURE],
        "dtype": "float32",
        "checkpoint": str(checkpoint),
        "model": model.model_dump(mode="json"),
        # This is the width of the logits for vLLM's sampler; the embedding may have more rows.
        "vocab_size": tokenizer_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.n_kv_heads,
        "num_experts": model.moe.experts if model.moe else 0,
        # vLLM needs room for a token after the last one, even if a prompt is only scored.
        "max_position_embeddings": manifest.seq_len + 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
