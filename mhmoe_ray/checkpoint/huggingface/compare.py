"""Comparison of two models: weights tensor by tensor and expert by expert, and logits for fixed random tokens.

A model is a checkpoint of a run or a folder in Hugging Face's layout. Both are read one layer at a time, under the
names of `names.py`, so that a checkpoint can be compared with its export, and an import with its source.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.checkpoint.huggingface.adapters import ADAPTERS, computed_function
from mhmoe_ray.checkpoint.huggingface.config import CONFIG, is_adapter_folder, read_config
from mhmoe_ray.checkpoint.huggingface.files import open_tensors
from mhmoe_ray.checkpoint.huggingface.names import TensorEntry, tensor_entries
from mhmoe_ray.checkpoint.load import WeightsReader
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Location

PROBE_TOKENS = 64
"""Largest number of random tokens for which logits are compared; equal vocabulary sizes give the same tokens."""
NARROW_DTYPES = (torch.bfloat16, torch.float16)
EXPERT = re.compile(r"(model\.layers\.\d+\.block_sparse_moe\.experts)\.(\d+)\.(.+)")


class StoredModel(NamedTuple):
    """A model in storage, whose tensors are read one by one."""

    label: str
    """Name of the checkpoint or the folder in messages."""
    model: ModelSpec
    seq_len: int
    entries: list[list[TensorEntry]]
    """Tensors outside the layers, then a group for each layer."""
    names: set[str]
    """Names of the stored tensors in the table of `names.py`; tensors that it lacks keep their stored names."""
    read: Callable[[str], Tensor]
    """Function that reads a tensor by its name in the table."""


@contextmanager
def open_model(location: Location) -> Iterator[StoredModel]:
    """Open a run's checkpoint or a folder in Hugging Face's layout; CheckpointError if the model cannot be read."""
    if isinstance(location, Path) and ((location / CONFIG).is_file() or is_adapter_folder(location)):
        with _open_folder(location) as stored_model:
            yield stored_model
    else:
        yield _open_checkpoint(location)


@contextmanager
def _open_folder(folder: Path) -> Iterator[StoredModel]:
    model_type, section = read_config(folder, None)
    table_entries = tensor_entries(section.model)
    folder_entries = tensor_entries(section.model, ADAPTERS[model_type].name_replacements)
    folder_names = {
        table_name: folder_name
        for table_group, folder_group in zip(table_entries, folder_entries, strict=True)
        for table_entry, folder_entry in zip(table_group, folder_group, strict=True)
        for table_name, folder_name in zip(table_entry.exported_names, folder_entry.exported_names, strict=True)
    }
    table_names = {folder_name: table_name for table_name, folder_name in folder_names.items()}
    with open_tensors(folder) as stored:
        redundant_names = stored.redundant_names(tied_embeddings=section.model.tied_embeddings)
        names = {table_names.get(name, name) for name in stored.names - redundant_names}
        yield StoredModel(
            f"folder {folder}",
            section.model,
            section.seq_len,
            table_entries,
            names,
            lambda name: stored.read(folder_names[name]),
        )


def _open_checkpoint(checkpoint: Location) -> StoredModel:
    """Open a checkpoint after checking the hashes of its files; another model than a decoder is a CheckpointError."""
    manifest = read_manifest(checkpoint, parts=("weights",))
    if not manifest.model.family.predicts_next_token:
        reason = f"its model is {manifest.model.family.title}, and only decoders are compared"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, "verify it alone: leave out the second model")
    weights = WeightsReader(checkpoint)
    entries = tensor_entries(manifest.model)
    entry_of = {name: entry for group in entries for entry in group for name in entry.exported_names}
    names = {name for name, entry in entry_of.items() if entry.checkpoint_name in weights.index}
    # A tensor may be exported in several parts, which callers read one after another. The parts of the tensor that was
    # loaded last are kept, so that it is loaded only once.
    last_parts: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in last_parts:
            last_parts.clear()
            last_parts.update(_read_entry(weights, entry_of[name]))
        return last_parts[name]

    return StoredModel(f"checkpoint {checkpoint}", manifest.model, manifest.seq_len, entries, names, read)


def _read_entry(weights: WeightsReader, entry: TensorEntry) -> dict[str, Tensor]:
    """Read one tensor of a checkpoint, and return the exported tensors into which it is split, by name."""
    tensors = weights.read({entry.checkpoint_name: entry.shape})
    return entry.split(tensors[entry.checkpoint_name])


class ModelDifference(NamedTuple):
    """A difference between two models."""

    kind: str
    """Kind of the difference: model, missing, shape, swapped, zero, transposed, rounded or different."""
    subject: str
    """Name of the tensor, the expert or the option."""
    detail: str

    @property
    def is_rounding(self) -> bool:
        return self.kind == "rounded"


class LogitDifference(NamedTuple):
    """Difference between the logits of two models for the same tokens."""

    largest: float
    same_choices: float
    """Share of the positions, from 0 to 1, at which both models give the same token the highest logit."""


def compare_weights(first_model: StoredModel, second_model: StoredModel) -> list[ModelDifference]:
    """Return the differences between two models in sizes, weights, and options that matter outside of training."""
    findings = _compare_functions(first_model.model, second_model.model)
    if findings:
        # If the models differ in sizes or options, nearly every tensor differs too, so tensors are not compared.
        return findings
    for a, b in ((first_model, second_model), (second_model, first_model)):
        findings += [ModelDifference("missing", name, f"it is not in {b.label}") for name in sorted(a.names - b.names)]
    common_names = first_model.names & second_model.names
    for group in first_model.entries:
        names = [name for entry in group for name in entry.exported_names if name in common_names]
        experts = {name: match for name in names if (match := EXPERT.fullmatch(name))}
        for name in names:
            if name not in experts:
                findings += _compare_tensors(name, first_model.read(name), second_model.read(name))
        if experts:
            findings += _compare_experts(first_model, second_model, experts)
    return findings


def _compare_functions(first_model: ModelSpec, second_model: ModelSpec) -> list[ModelDifference]:
    def flat(fields: dict[str, object], prefix: str = "") -> dict[str, object]:
        items: dict[str, object] = {}
        for key, value in fields.items():
            items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return items

    a, b = flat(computed_function(first_model)), flat(computed_function(second_model))
    return [
        ModelDifference("model", f"model.{key}", f"{a.get(key)} and {b.get(key)}")
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]


def _relation(a: Tensor, b: Tensor) -> str:
    """Return how two tensors relate: equal, rounded, transposed, shape (their shapes differ) or different."""
    if a.shape == b.shape:
        if torch.equal(a.double(), b.double()):
            return "equal"
        if _is_rounded(a, b):
            return "rounded"
    if a.ndim == 2 and a.T.shape == b.shape and (torch.equal(a.T.double(), b.double()) or _is_rounded(a.T, b)):
        return "transposed"
    return "different" if a.shape == b.shape else "shape"


def _is_rounded(a: Tensor, b: Tensor) -> bool:
    """Return whether one tensor equals the other one after rounding to bfloat16 or float16."""
    return any(
        torch.equal(wide.to(dtype).double(), narrow.double())
        for dtype in NARROW_DTYPES
        for wide, narrow in ((a, b), (b, a))
    )


def _compare_tensors(name: str, a: Tensor, b: Tensor) -> list[ModelDifference]:
    # Some tools store a scalar without a dimension.
    relation = _relation(a.reshape(a.shape or (1,)), b.reshape(b.shape or (1,)))
    details = {
        "rounded": "one is the other, rounded to 16 bits",
        "transposed": "one is the transpose of the other",
        "shape": f"shapes {tuple(a.shape)} and {tuple(b.shape)}",
    }
    if relation == "equal":
        return []
    if relation == "different" and (not a.any() or not b.any()):
        return [ModelDifference("zero", name, f"it is zero in the {'first' if not a.any() else 'second'}")]
    if relation == "different":
        difference = (a.double() - b.double()).abs().max().item()
        details["different"] = f"largest difference {difference:.3g}, largest value {a.double().abs().max().item():.3g}"
    return [ModelDifference(relation, name, details[relation])]


def _compare_experts(
    first_model: StoredModel, second_model: StoredModel, experts: dict[str, re.Match[str]]
) -> list[ModelDifference]:
    """Return the differences between the experts of a layer; `experts` maps tensor names to matches of `EXPERT`."""
    a: dict[int, dict[str, Tensor]] = defaultdict(dict)
    b: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, match in experts.items():
        a[int(match[2])][match[3]] = first_model.read(name)
        b[int(match[2])][match[3]] = second_model.read(name)
    [layer] = {match[1] for match in experts.values()}
    unequal = [e for e in a if _expert_relation(a[e], b[e]) != "equal"]
    findings: list[ModelDifference] = []
    for e in unequal:
        relation = _expert_relation(a[e], b[e])
        counterpart = next(
            (f for f in unequal if f != e and _expert_relation(a[e], b[f]) in ("equal", "rounded")), None
        )
        if relation == "rounded":
            findings.append(ModelDifference("rounded", f"{layer}.{e}", "one is the other, rounded to 16 bits"))
        elif counterpart is not None:
            findings.append(ModelDifference("swapped", f"{layer}.{e}", f"it is expert {counterpart} of the second"))
        elif _is_zero(a[e].values()) or _is_zero(b[e].values()):
            side = "first" if _is_zero(a[e].values()) else "second"
            findings.append(ModelDifference("zero", f"{layer}.{e}", f"all of it is zero in the {side}"))
        else:
            for part in a[e]:
                findings += _compare_tensors(f"{layer}.{e}.{part}", a[e][part], b[e][part])
    return findings


def _expert_relation(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """Return how two experts relate: equal, rounded or different."""
    relations = {_relation(a[part], b[part]) for part in a}
    if relations == {"equal"}:
        return "equal"
    return "rounded" if relations <= {"equal", "rounded"} else "different"


def _is_zero(tensors: Iterable[Tensor]) -> bool:
    return not any(t.any() for t in tensors)


@torch.inference_mode()
def compare_logits(first_model: StoredModel, second_model: StoredModel) -> LogitDifference | None:
    """Return the difference between two models' logits in float32; both have the same tensor names.

    It is None for router `domain`, which needs tokens of a known domain. A missing or misshapen tensor is a
    CheckpointError.
    """
    if any(m.model.moe is not None and m.model.moe.router == "domain" for m in (first_model, second_model)):
        return None
    length = min(PROBE_TOKENS, first_model.seq_len, second_model.seq_len)
    tokens = torch.randint(first_model.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    # The generator loads one model after the other, so that only one is in memory at a time.
    a, b = (_probe_logits(stored_model, tokens) for stored_model in (first_model, second_model))
    return LogitDifference((a - b).abs().max().item(), (a.argmax(-1) == b.argmax(-1)).double().mean().item())


def _probe_logits(stored_model: StoredModel, tokens: Tensor) -> Tensor:
    """Load a stored model, and return its logits of shape (T, vocabulary) for tokens of shape (1, T)."""
    model = Decoder(stored_model.model).requires_grad_(False).eval()
    tensors = model.named_tensors()
    for group in stored_model.entries:
        for entry in group:
            try:
                joined = entry.join([stored_model.read(name).float() for name in entry.exported_names])
                tensors[entry.checkpoint_name].copy_(joined.reshape(entry.shape))
            except (KeyError, RuntimeError) as e:
                reason = f"{entry.exported_names[0]} is missing or has another shape"
                raise CheckpointError(stored_model.label, reason, "compare complete models") from e
    document_BT = torch.zeros_like(tokens) if stored_model.model.document_masks else None
    logits_TV: Tensor = model(tokens, document_BT=document_BT).logits_BTV[0]
    return logits_TV
