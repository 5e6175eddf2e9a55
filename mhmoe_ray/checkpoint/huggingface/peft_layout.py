"""PEFT's layout of a LoRA adapter: adapter_config.json and adapter_model.safetensors.

PEFT 0.21 names an adapter's tensors after modules of transformers 5, where the experts of a layer are two parameters,
`gate_up_proj` and `down_proj`. It adapts such a parameter as a whole. The adapters of an expert's gate and up matrices
are one adapter of the rows of both: its A has the rows of both A, and its B is block-diagonal. An adapter of E experts
has two tensors:

    lora_A    [E * rank, in], expert by expert
    lora_B    [out, rank * E], in which the expert is the last index

The adapters of two parameters of one module are nested: the first one's tensors are those of `base_layer`.

In this package, adapters in this layout are low-rank terms of exported matrices, by the names of `names.py`.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_kernels import widen
from mhmoe_ray.checkpoint.huggingface.adapters import ADAPTERS
from mhmoe_ray.checkpoint.huggingface.adapters.mixture import MixtureAdapter
from mhmoe_ray.checkpoint.huggingface.config import ADAPTER_CONFIG, is_adapter_folder
from mhmoe_ray.checkpoint.huggingface.files import StoredTensors, open_tensors, report_read_errors
from mhmoe_ray.checkpoint.huggingface.peft_config import read_peft_config
from mhmoe_ray.errors import CheckpointError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_SHA256 = "base_sha256"
"""Key of the file's metadata with the `model_sha256` of the base."""
PREFIX = "base_model.model."
GATE_UP_NAME, DOWN_NAME = "gate_up_proj", "down_proj"
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(\w+)")


class LowRankTerm(NamedTuple):
    """Term scale * B A of an exported matrix: A is [rank, in] and B is [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """Return the sum of a matrix and this term, computed in float32 or wider, in the dtype of the matrix."""
        return (widen(weight) + widen(self.b) @ widen(self.a) * self.scale).to(weight.dtype)


class PeftTarget(NamedTuple):
    """Linear layer or parameter of a model in transformers, which PEFT adapts as one matrix or one stack."""

    module: str
    parameter: str | None
    """Name of the parameter in the module; None for a linear layer."""
    stack: list[list[str]]
    """Exported matrices of each expert whose rows are joined; one expert if the target is no stack."""

    @property
    def key(self) -> str:
        """The full name that patterns and lists of targets in adapter_config.json match."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module

    def encode(self, terms: dict[str, LowRankTerm]) -> tuple[Tensor, Tensor]:
        """Return PEFT's two tensors for the terms of the target's matrices, which have the same scale."""
        experts = [[terms[name] for name in names] for names in self.stack]
        b_EOZ = torch.stack([_block_diagonal([term.b for term in expert]) for expert in experts])
        return torch.cat([term.a for expert in experts for term in expert]), b_EOZ.permute(1, 2, 0).flatten(1)

    def decode(self, a: Tensor, b: Tensor, scale: float) -> Iterator[tuple[str, LowRankTerm]]:
        """Yield the term of each matrix of the target from PEFT's two tensors."""
        experts = len(self.stack)
        b_EOZ = b.view(len(b), -1, experts).permute(2, 0, 1)
        for names, a_ZI, b_OZ in zip(self.stack, a.chunk(experts), b_EOZ, strict=True):
            for name, b_part in zip(names, b_OZ.chunk(len(names)), strict=True):
                yield name, LowRankTerm(a_ZI, b_part, scale)


def _block_diagonal(matrices: list[Tensor]) -> Tensor:
    diagonal: Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
    return diagonal


def tensor_names(module: str) -> tuple[str, str]:
    """Return the names of a module's A and B in adapter_model.safetensors."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def peft_targets(
    model_type: str, names: Iterable[str], target_parameters: Iterable[str] | None = None
) -> dict[str, PeftTarget]:
    """Return the targets in transformers that have matrices of these exported names, by their stored modules.

    `target_parameters` is that of adapter_config.json, by default all parameters. A parameter that it lacks is adapted
    as one linear layer per matrix, as in transformers 4.
    """
    is_mixture = issubclass(ADAPTERS[model_type], MixtureAdapter)
    endings = None if target_parameters is None else tuple(f".{name}" for name in target_parameters)
    targets: dict[tuple[str, str | None], dict[str, list[str]]] = {}
    for name in names:
        layer = module = expert = name.removesuffix(".weight")
        parameter = "weight" if module.endswith(".gate") else None
        if is_mixture:
            module = module.replace(".block_sparse_moe.", ".mlp.")
            if match := _EXPERT.fullmatch(module):
                expert = module.rpartition(".")[0]
                module, parameter = match[1], DOWN_NAME if match[2] in ("w2", "down_proj") else GATE_UP_NAME
            elif ".self_attn." not in module:
                # PEFT takes the linear layers gate_proj, up_proj and down_proj for experts, but not their weights.
                parameter = "weight"
        if endings is not None:
            is_targeted = f".{module}.{parameter or 'weight'}".endswith(endings)
            module, parameter, expert = (module, parameter or "weight", expert) if is_targeted else (layer, None, layer)
        targets.setdefault((module, parameter), {}).setdefault(expert, []).append(name)
    return {
        f"{module}.base_layer" if parameter == GATE_UP_NAME and (module, DOWN_NAME) in targets else module: PeftTarget(
            module, parameter, list(experts.values())
        )
        for (module, parameter), experts in targets.items()
    }


def model_sha256(read: Callable[[str], Tensor], names: Iterable[str]) -> str:
    """Return the hash of the values of a model's exported tensors, whatever their dtypes and files."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(read(name).float().numpy().tobytes())
    return digest.hexdigest()


def read_adapter(source: Path, model_type: str, base: StoredTensors, names: Iterable[str]) -> dict[str, LowRankTerm]:
    """Return the terms of an adapter's folder, by the exported names of the matrices; none for a model's folder.

    `names` are those of all tensors of the base, in the order of the model. An adapter of another kind, shape or base,
    or one that changes nothing, is a CheckpointError.
    """
    if not is_adapter_folder(source):
        return {}
    config, subject, names = read_peft_config(source), f"folder {source}", list(names)
    matrices = [name for name in names if name.endswith(".weight") and len(base.shape(name)) == 2]
    targets = peft_targets(model_type, matrices, config.target_parameters or ())
    terms: dict[str, LowRankTerm] = {}
    with (
        report_read_errors(subject, "repair its disk, or get the folder again"),
        open_tensors(source, ADAPTER_WEIGHTS) as stored,
    ):
        known_names = {name for module in targets for name in tensor_names(module)}
        if unknown_names := sorted(stored.names - known_names):
            reason = f"{unknown_names[0]} adapts nothing that is known in a {model_type}"
            raise CheckpointError(subject, reason, "merge it with PEFT")
        base_sha256 = stored.metadata.get(BASE_SHA256)
        if base_sha256 and base_sha256 != model_sha256(base.read, names):
            reason = f"{config.base_model_name_or_path} has other weights than the base that the adapter was trained on"
            raise CheckpointError(subject, reason, f"correct base_model_name_or_path in its {ADAPTER_CONFIG}")
        for module, target in targets.items():
            adapter_names = [name for name in tensor_names(module) if name in stored.names]
            if not adapter_names:
                continue
            if len(adapter_names) == 1:
                raise CheckpointError(subject, f"{module} lacks one of lora_A and lora_B", "get the folder again")
            rank, scale = config.rank_and_scale(target.key)
            row_counts, widths = zip(*map(base.shape, target.stack[0]), strict=True)
            all_ranks = rank * len(target.stack)
            shapes = [stored.shape(name) for name in adapter_names if stored.dtype(name)]
            expected = [(all_ranks, widths[0]), (sum(row_counts), all_ranks)]
            if shapes != expected:
                reason = f"{module} has matrices of shapes {shapes}, and its rank and its base need {expected}"
                raise CheckpointError(subject, reason, "use the base that the adapter was made for")
            a, b = map(stored.read, adapter_names)
            terms |= target.decode(a, b, scale)
    if not any(term.b.any() for term in terms.values()):
        raise CheckpointError(subject, "its adapter changes nothing, because all its matrices B are zero", "train it")
    return terms
