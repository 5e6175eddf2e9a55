"""Export of a checkpoint with an adapter: the adapter in PEFT's layout, or its sums with the base."""

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from mhmoe_ray.checkpoint.huggingface.adapters import ADAPTERS
from mhmoe_ray.checkpoint.huggingface.compare import compare_weights, open_model
from mhmoe_ray.checkpoint.huggingface.config import ADAPTER_CONFIG, ExportResult, is_adapter_folder, read_config
from mhmoe_ray.checkpoint.huggingface.export import check_exportable, export
from mhmoe_ray.checkpoint.huggingface.files import new_folder, open_tensors, report_read_errors, write_file
from mhmoe_ray.checkpoint.huggingface.hub import PREFIX as HUB_PREFIX
from mhmoe_ray.checkpoint.huggingface.hub import local_folder, pinned_source
from mhmoe_ray.checkpoint.huggingface.model_card import CARD
from mhmoe_ray.checkpoint.huggingface.names import TensorEntry, tensor_entries
from mhmoe_ray.checkpoint.huggingface.peft_layout import (
    ADAPTER_WEIGHTS,
    BASE_SHA256,
    LowRankTerm,
    model_sha256,
    peft_targets,
    tensor_names,
)
from mhmoe_ray.checkpoint.load import WeightsReader
from mhmoe_ray.checkpoint.manifest import AdapterRecord, CheckpointManifest
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.spec.adapter import AdapterSpec
from mhmoe_ray.storage import Location, replace_file, write_json


def export_checkpoint(
    checkpoint: Location, manifest: CheckpointManifest, target: Path, *, merge: bool = False, base: str | None = None
) -> ExportResult:
    """Export a verified checkpoint like `export`, but an adapter in PEFT's layout unless `merge` is true.

    `base` is the folder or the model of the hub that PEFT loads first; by default, the one that the run started from.
    An adapter that changes nothing, and a base that has other weights than the adapter's, are a CheckpointError too.
    """
    subject = f"checkpoint {checkpoint}"
    if (merge or base) and manifest.adapter is None:
        raise CheckpointError(subject, "it has no adapter", "export it without merge and base")
    if merge and base:
        raise CheckpointError(subject, "a merged model needs no base beside it", "leave out one of merge and base")
    check_exportable(checkpoint, manifest)
    if manifest.adapter is None:
        return export(checkpoint, manifest, target)
    if not any(b.any() for *_, b in WeightsReader(checkpoint).adapters()):
        reason = "its adapter changes nothing, because all its matrices B are zero"
        raise CheckpointError(subject, reason, f"train it further, or export its base, {manifest.adapter.base}")
    if merge:
        return export(checkpoint, manifest, target)
    return _export_adapter(checkpoint, manifest.adapter, manifest.step, target, base)


def _export_adapter(
    checkpoint: Location, record: AdapterRecord, step: int, target: Path, base: str | None
) -> ExportResult:
    run = RunDir.of_checkpoint(checkpoint)
    base = base or _start_model(run)
    folder = local_folder(base).absolute()
    model_type, section = read_config(folder, None)
    entries = [e for group in tensor_entries(section.model, ADAPTERS[model_type].name_replacements) for e in group]
    _check_base(checkpoint.with_name(record.base), folder, run)
    with open_tensors(folder) as stored, report_read_errors(f"base {base}", "get the folder again"):
        base_sha256 = model_sha256(stored.read, [name for e in entries for name in e.exported_names])
    with report_read_errors(f"checkpoint {checkpoint}", "repair its storage, or use another one"):
        terms = read_terms(checkpoint, entries)
    base_name, revision = str(folder), None
    if base.startswith(HUB_PREFIX):
        base_name, _, revision = pinned_source(base, folder).removeprefix(HUB_PREFIX).partition("@")
    tensors, config = peft_contents(model_type, terms, record.spec)
    config |= {"base_model_name_or_path": base_name, "revision": revision}
    options = f', revision="{revision}"' if revision else ""
    options += ", trust_remote_code=True" if model_type == "mhmoe" else ""
    with new_folder(target) as staging:
        write_file(staging / ADAPTER_WEIGHTS, tensors, **{BASE_SHA256: base_sha256})
        write_json(staging / ADAPTER_CONFIG, config)
        replace_file(staging / CARD, _card(run, record, step, base_name, options).encode())
    return ExportResult(model_type, len(tensors), sum(t.nbytes for t in tensors.values()), checkpoint.name, base)


def peft_contents(
    model_type: str, terms: dict[str, LowRankTerm], spec: AdapterSpec
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the configuration of an adapter in PEFT's layout, without the base's name."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    names_by_kind: dict[str, set[str]] = {"target_modules": set(), "target_parameters": set()}
    for module, peft_target in peft_targets(model_type, terms).items():
        tensors |= zip(tensor_names(module), peft_target.encode(terms), strict=True)
        # A layer's number is left out, because each target is adapted in all layers that have it.
        kind = "target_parameters" if peft_target.parameter else "target_modules"
        names_by_kind[kind].add(re.sub(r"model\.layers\.\d+\.", "", peft_target.key))
        if (matrices := len(peft_target.stack[0])) > 1:
            # The scale is alpha / rank, so alpha grows with the rank of joined matrices.
            assert peft_target.parameter is not None
            ranks[peft_target.parameter] = spec.rank * matrices
            alphas[peft_target.parameter] = spec.alpha * matrices
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        **{kind: sorted(names) for kind, names in names_by_kind.items()},
    }
    return tensors, config


def _start_model(run: RunDir) -> str:
    """Return the folder or the model of the hub that a run started from; CheckpointError if it began otherwise."""
    start = read_start(run)
    if start and start.how == "copy":
        [ancestor] = start.ancestors
        is_folder = ancestor.name == ancestor.path and not is_adapter_folder(Path(ancestor.path))
        if is_folder or ancestor.name.startswith(HUB_PREFIX):
            return ancestor.name
    reason = "the model that it started from is in no folder that PEFT could load"
    endings = ("@0 --to BASE", " --base BASE --to ADAPTER", " --merge --to MODEL")
    base_command, adapter_command, merge_command = (f"`mhmoe ckpt export {run.id}{ending}`" for ending in endings)
    fix = f"export the base too ({base_command}, then {adapter_command}), or the sums of both ({merge_command})"
    raise CheckpointError(f"adapter of {run.id}", reason, fix)


def _check_base(base_checkpoint: Location, folder: Path, run: RunDir) -> None:
    """Raise a CheckpointError if a folder has other weights than the base of an adapter, apart from rounding."""
    with open_model(base_checkpoint) as own_base, open_model(folder) as other_base:
        finding = next((f for f in compare_weights(own_base, other_base) if not f.is_rounding), None)
    if finding:
        reason = f"it is not the base of the adapter, but differs in {finding.subject} ({finding.detail})"
        raise CheckpointError(f"base {folder}", reason, f"export the base with `mhmoe ckpt export {run.id}@0`")


def read_terms(checkpoint: Location, entries: list[TensorEntry]) -> dict[str, LowRankTerm]:
    """Return the adapter as low-rank terms of exported matrices."""
    entry_of = {entry.checkpoint_name: entry for entry in entries}
    terms: dict[str, LowRankTerm] = {}
    for name, matrix_sum, a, b in WeightsReader(checkpoint).adapters():
        entry = entry_of[name]
        if entry.is_stacked:
            parts = zip(entry.exported_names, a, b, strict=True)
            terms |= {part: LowRankTerm(a_ZI, b_OZ, matrix_sum.scale) for part, a_ZI, b_OZ in parts}
        else:
            starts = accumulate(entry.row_counts[:-1], initial=0)
            part_names = dict(zip(starts, entry.exported_names, strict=True))
            terms[part_names[matrix_sum.rows.start or 0]] = LowRankTerm(a, b, matrix_sum.scale)
    return terms


def _card(run: RunDir, record: AdapterRecord, step: int, base: str, options: str) -> str:
    return f"""---
library_name: peft
base_model: {base}
tags:
- lora
- mhmoe-ray
---

# {run.id}

LoRA adapter of rank {record.spec.rank} and alpha {record.spec.alpha:g}, step {step:,}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}"{options})
model = PeftModel.from_pretrained(base, ".")
```
"""
