"""Export of a checkpoint's adapter to a folder in PEFT's layout."""

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from mhmoe_ray.checkpoint.huggingface.adapters import choose_adapter
from mhmoe_ray.checkpoint.huggingface.compare import compare_weights, open_model
from mhmoe_ray.checkpoint.huggingface.config import ADAPTER_CONFIG, ExportResult, is_adapter_folder
from mhmoe_ray.checkpoint.huggingface.files import new_folder, report_read_errors, write_file
from mhmoe_ray.checkpoint.huggingface.hub import PREFIX as HUB_PREFIX
from mhmoe_ray.checkpoint.huggingface.hub import local_folder
from mhmoe_ray.checkpoint.huggingface.model_card import CARD
from mhmoe_ray.checkpoint.huggingface.names import TensorEntry, tensor_entries
from mhmoe_ray.checkpoint.huggingface.peft_layout import (
    ADAPTER_WEIGHTS,
    PREFIX,
    LowRankTerm,
    peft_targets,
    stored_targets,
)
from mhmoe_ray.checkpoint.load import WeightsReader
from mhmoe_ray.checkpoint.manifest import AdapterRecord, CheckpointManifest
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.storage import Location, replace_file, write_json


def check_adapter(checkpoint: Location, manifest: CheckpointManifest) -> None:
    """Raise a CheckpointError if the checkpoint has an adapter that changes nothing."""
    if manifest.adapter and not any(b.any() for *_, b in WeightsReader(checkpoint).adapters()):
        reason = "its adapter changes nothing, because all its matrices B are zero"
        fix = f"train it further, or export its base, {manifest.adapter.base}"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, fix)


def export_adapter(
    checkpoint: Location, manifest: CheckpointManifest, target: Path, base: str | None = None
) -> ExportResult:
    """Export the adapter of a verified checkpoint to a new or empty folder in PEFT's layout.

    `base` is the folder or the model of the hub that PEFT loads first; by default, the one that the run started from.
    An adapter that changes nothing, a base that has other weights than the adapter's, or a failure to read or write is
    a CheckpointError.
    """
    record = manifest.adapter
    assert record is not None
    check_adapter(checkpoint, manifest)
    base = _check_base(checkpoint, record, base) if base else _start_model(checkpoint, record)
    model_type = choose_adapter(manifest.model, manifest.seq_len).model_type
    with report_read_errors(f"checkpoint {checkpoint}", "repair its storage, or use another one"):
        terms = _read_terms(checkpoint, manifest)
    all_targets = peft_targets(model_type, terms)
    targets = stored_targets(all_targets, [target.key for target in all_targets])
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, peft_target in targets.items():
        a, b = peft_target.encode(terms)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        if (matrices := len(peft_target.stack[0])) > 1:
            # The scale is alpha / rank, so alpha grows with the rank of joined matrices.
            assert peft_target.parameter is not None
            ranks[peft_target.parameter] = record.spec.rank * matrices
            alphas[peft_target.parameter] = record.spec.alpha * matrices
    # A layer's number is left out, because each target is adapted in all layers that have it.
    names = {re.sub(r"model\.layers\.\d+\.", "", t.key): t.parameter is None for t in targets.values()}
    repository, _, revision = base.removeprefix(HUB_PREFIX).partition("@")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": repository if base.startswith(HUB_PREFIX) else base,
        "revision": revision or None if base.startswith(HUB_PREFIX) else None,
        "inference_mode": True,
        "r": record.spec.rank,
        "lora_alpha": record.spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name for name, is_module in names.items() if is_module),
        "target_parameters": sorted(name for name, is_module in names.items() if not is_module),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    with new_folder(target) as folder:
        write_file(folder / ADAPTER_WEIGHTS, tensors)
        write_json(folder / ADAPTER_CONFIG, config)
        replace_file(folder / CARD, _card(checkpoint, manifest, base, model_type).encode())
    size = sum(t.nbytes for t in tensors.values())
    return ExportResult(model_type, len(tensors), size, checkpoint.name, base)


def _start_model(checkpoint: Location, record: AdapterRecord) -> str:
    """Return the folder or the model of the hub that the run started from; CheckpointError if it began otherwise."""
    run = RunDir.of_checkpoint(checkpoint)
    start = read_start(run)
    if start and start.how == "copy":
        [ancestor] = start.ancestors
        if ancestor.name.startswith(HUB_PREFIX):
            return ancestor.name
        if ancestor.name == ancestor.path and not is_adapter_folder(Path(ancestor.path)):
            return _check_base(checkpoint, record, ancestor.path)
    reason = "the model that it started from is in no folder that PEFT could load"
    fix = f"export the base (`mhmoe ckpt export {run.id}@0 --to BASE`) and add `--base BASE`, or use --merge"
    raise CheckpointError(f"adapter of {run.id}", reason, fix)


def _check_base(checkpoint: Location, record: AdapterRecord, base: str) -> str:
    """Return the absolute path of a base, or its name on the hub; CheckpointError if it is not the adapter's base."""
    folder = local_folder(base).absolute()
    base_checkpoint = checkpoint.with_name(record.base)
    with open_model(base_checkpoint) as own_base, open_model(folder) as other_base:
        finding = next((f for f in compare_weights(own_base, other_base) if not f.is_rounding), None)
    if finding:
        reason = f"it is not the base of the adapter, but differs in {finding.subject} ({finding.detail})"
        fix = f"export the base with `mhmoe ckpt export {RunDir.of_checkpoint(checkpoint).id}@0`"
        raise CheckpointError(f"base {base}", reason, fix)
    return base if base.startswith(HUB_PREFIX) else str(folder)


def _read_terms(checkpoint: Location, manifest: CheckpointManifest) -> dict[str, LowRankTerm]:
    """Return the adapter as low-rank terms of exported matrices."""
    replacements = choose_adapter(manifest.model, manifest.seq_len).name_replacements
    entries = {e.checkpoint_name: e for group in tensor_entries(manifest.model, replacements) for e in group}
    terms: dict[str, LowRankTerm] = {}
    for name, matrix_sum, a, b in WeightsReader(checkpoint).adapters():
        entry: TensorEntry = entries[name]
        if entry.is_stacked:
            parts = zip(entry.exported_names, a, b, strict=True)
            terms |= {part: LowRankTerm(a_ZI, b_OZ, matrix_sum.scale) for part, a_ZI, b_OZ in parts}
        else:
            starts = accumulate(entry.row_counts[:-1], initial=0)
            part_names = dict(zip(starts, entry.exported_names, strict=True))
            terms[part_names[matrix_sum.rows.start or 0]] = LowRankTerm(a, b, matrix_sum.scale)
    return terms


def _card(checkpoint: Location, manifest: CheckpointManifest, base: str, model_type: str) -> str:
    record, run = manifest.adapter, RunDir.of_checkpoint(checkpoint)
    assert record is not None
    trust = ", trust_remote_code=True" if model_type == "mhmoe" else ""
    name, _, revision = base.removeprefix(HUB_PREFIX).partition("@")
    revision_text = f', revision="{revision}"' if revision else ""
    return f"""---
library_name: peft
base_model: {name}
tags:
- lora
- mhmoe-ray
---

# {run.id}

LoRA adapter of rank {record.spec.rank} and alpha {record.spec.alpha:g}, step {manifest.step:,}.
The weights of its base have the hash {record.base_sha256}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{name}"{revision_text}{trust})
model = PeftModel.from_pretrained(base, ".")
```
"""
