"""Adapters as vLLM loads them: linear layers only, in PEFT's layout. This module does not import vLLM."""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from mhmoe_ray.checkpoint.huggingface.adapters.mhmoe import MhmoeAdapter
from mhmoe_ray.checkpoint.huggingface.config import ADAPTER_CONFIG
from mhmoe_ray.checkpoint.huggingface.files import write_file
from mhmoe_ray.checkpoint.huggingface.names import tensor_entries
from mhmoe_ray.checkpoint.huggingface.peft_export import peft_contents, read_terms
from mhmoe_ray.checkpoint.huggingface.peft_layout import ADAPTER_WEIGHTS
from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.errors import ServeError
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import Location, write_json

UNSERVED_TARGETS = ("router", "experts")
"""Targets that vLLM cannot adapt: the router is ours, and experts have no adapters in its CPU build."""
MAX_LORA_RANK = 16
"""vLLM's default of `max_lora_rank`."""
_adapter_ids = count(1)


def check_adapter(name: str, manifest: CheckpointManifest, spec: ServeSpec) -> None:
    """Raise ServeError if vLLM cannot compute a checkpoint's adapter, or has no room for its rank."""
    record = manifest.adapter
    assert record is not None
    targets = record.spec.matched_targets(manifest.model)
    if unserved_targets := [target for target in targets if target in UNSERVED_TARGETS]:
        reason = f"engine vllm has no adapters of {' and '.join(unserved_targets)}"
        fix = "set serve.engine=torch, or serve the sums with its base, which `mhmoe ckpt export --merge` writes"
        raise ServeError(f"adapter {name}", reason, fix)
    if record.spec.rank > (max_rank := spec.vllm.get("max_lora_rank", MAX_LORA_RANK)):
        reason = f"its rank is {record.spec.rank}, and vLLM has room for {max_rank}"
        raise ServeError(f"adapter {name}", reason, "deploy it with a larger serve.vllm.max_lora_rank")


def lora_options(model: ModelSpec, spec: ServeSpec, on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's engine for the adapters of a deployment."""
    if not spec.max_adapters:
        return {}
    names = [
        name.removesuffix(".weight") for group in tensor_entries(model) for e in group for name in e.exported_names
    ]
    projections = [name for name in names if ".head_proj" in name or ".merge_proj" in name]
    return {
        "enable_lora": True,
        # On a CPU, vLLM adds the product of the last place to rows without an adapter, so that place stays empty.
        "max_loras": spec.max_adapters + on_cpu,
        "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", *projections],
    }


@dataclass(frozen=True, eq=False)
class VllmAdapter:
    """Adapter in PEFT's layout, with an id that no other adapter of this process has."""

    id: int
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @classmethod
    def read(cls, checkpoint: Location, manifest: CheckpointManifest) -> "VllmAdapter":
        """Read the adapter of a checkpoint that `check_adapter` accepts."""
        assert manifest.adapter is not None
        terms = read_terms(checkpoint, [entry for group in tensor_entries(manifest.model) for entry in group])
        return cls(next(_adapter_ids), *peft_contents(MhmoeAdapter.model_type, terms, manifest.adapter.spec))

    def write(self, folder: Path) -> None:
        write_file(folder / ADAPTER_WEIGHTS, self.tensors)
        write_json(folder / ADAPTER_CONFIG, self.config)
