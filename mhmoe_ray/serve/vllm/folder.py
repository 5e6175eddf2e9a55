"""A folder that stands in for a checkpoint where vLLM expects one in Hugging Face's format. Needs no vLLM."""

import json
from pathlib import Path

from mhmoe_ray.checkpoint.manifest import Manifest
from mhmoe_ray.errors import ServeError
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Location

ARCHITECTURE = "MhmoeForCausalLM"
FORMAT = "mhmoe"
"""Name of the checkpoint format, for `load_format`; also the type of the model in its configuration."""
CPU_MULTIPLE = 32
"""The width of an expert's rows must be a multiple of this on a CPU, because vLLM's CPU kernels are written for it."""


def check_fits(model: ModelSpec, on_cpu: bool) -> None:
    """Check that vLLM has layers for this model.

    Raises:
        ServeError: vLLM has none.
    """
    fix = "serve it with serve.engine=torch"
    if not model.architecture.runs_in_vllm:
        raise ServeError("engine vllm", f"it has no experts of the {model.backbone} backbone's kind", fix)
    width = model.d_model // model.moe.heads if model.moe else 0
    if on_cpu and width % CPU_MULTIPLE:
        why = f"on a CPU it computes experts on rows of a multiple of {CPU_MULTIPLE}, and d / h is {width} here"
        raise ServeError("engine vllm", why, fix)


def write_folder(folder: Path, checkpoint: Location, manifest: Manifest, known: int) -> None:
    """Write the model's configuration into an empty folder, to be loaded with `load_format="mhmoe"`.

    Args:
        folder: the folder, on this machine.
        checkpoint: location of the weights, which are not copied.
        manifest: the checkpoint's manifest.
        known: number of tokens that the tokenizer has.
    """
    model = manifest.model
    config = {
        "model_type": FORMAT,
        "architectures": [ARCHITECTURE],
        "dtype": "float32",
        "checkpoint": str(checkpoint),
        "model": model.model_dump(mode="json"),
        # Of logits, whose width all of vLLM's sampler counts on; the embedding may have more rows.
        "vocab_size": known,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.n_kv_heads,
        "num_experts": model.moe.experts if model.moe else 0,
        # vLLM wants room for a token after the last one, even where a prompt is only scored.
        "max_position_embeddings": manifest.seq_len + 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
