"""Names of tensors in a checkpoint and in an exported folder, for export and for import.

The table here has the names that all architectures share; an architecture adds those of its feed-forward layers.

A tensor that Hugging Face's Mixtral checkpoints have keeps its name there. The names of other tensors have the same
form, and are established ones if possible: torchscale's for the subln backbone and X-MoE's router, DeepSeek's for the
selection bias. Shapes are those of the model, except for two splits that a placeholder on the right stands for:

    {qkv}   rows of queries, keys and values, which the model keeps in one matrix (and one bias)
    {e}     one expert each by its global id, which the model keeps stacked along a first dimension

The other placeholders stand for the same text on both sides: {i} is a layer, {p} is weight or bias, {n} is the index of
a linear layer in a projection with several (0, 2, 4: ReLUs lie between).
"""

import re
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.architectures import ARCHITECTURES, ArchitectureName
from mhmoe_ray.checkpoint.huggingface.adapters.base import NameReplacements
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import ModelSpec

# fmt: off
NAME_TABLE: tuple[tuple[str, str], ...] = (
    # in a run's checkpoint                       in an exported folder
    ("embedding.weight",                          "model.embed_tokens.weight"),
    ("norm.{p}",                                  "model.norm.{p}"),
    ("output.weight",                             "lm_head.weight"),

    ("blocks.{i}.attention_norm.{p}",             "model.layers.{i}.input_layernorm.{p}"),
    ("blocks.{i}.attention.qkv.{p}",              "model.layers.{i}.self_attn.{qkv}_proj.{p}"),
    ("blocks.{i}.attention.q_norm.weight",        "model.layers.{i}.self_attn.q_norm.weight"),
    ("blocks.{i}.attention.k_norm.weight",        "model.layers.{i}.self_attn.k_norm.weight"),
    ("blocks.{i}.attention.inner_norm.{p}",       "model.layers.{i}.self_attn.inner_attn_ln.{p}"),
    ("blocks.{i}.attention.out.{p}",              "model.layers.{i}.self_attn.o_proj.{p}"),
    ("blocks.{i}.ffn_norm.{p}",                   "model.layers.{i}.post_attention_layernorm.{p}"),

    ("blocks.{i}.moe.head.{p}",                   "model.layers.{i}.block_sparse_moe.head_proj.{p}"),
    ("blocks.{i}.moe.head.{n}.{p}",               "model.layers.{i}.block_sparse_moe.head_proj.{n}.{p}"),
    ("blocks.{i}.moe.merge.{p}",                  "model.layers.{i}.block_sparse_moe.merge_proj.{p}"),
    ("blocks.{i}.moe.merge.{n}.{p}",              "model.layers.{i}.block_sparse_moe.merge_proj.{n}.{p}"),

    ("blocks.{i}.moe.router.scores.weight_ED",    "model.layers.{i}.block_sparse_moe.gate.weight"),
    ("blocks.{i}.moe.router.scores.reduce_QD",    "model.layers.{i}.block_sparse_moe.gate.wg_reduction.weight"),
    ("blocks.{i}.moe.router.scores.expert_EQ",    "model.layers.{i}.block_sparse_moe.gate.wg"),
    ("blocks.{i}.moe.router.scores.log_temperature", "model.layers.{i}.block_sparse_moe.gate.log_temperature"),
    ("blocks.{i}.moe.router.bias_E",              "model.layers.{i}.block_sparse_moe.gate.e_score_correction_bias"),
)
# fmt: on

_FIELD_PATTERNS = {"{i}": r"(?P<i>\d+)", "{n}": r"(?P<n>\d+)", "{p}": "(?P<p>weight|bias)"}


class TensorEntry(NamedTuple):
    """One tensor of the model, and the exported tensors into which it is split, in order."""

    checkpoint_name: str
    shape: tuple[int, ...]
    exported_names: tuple[str, ...]
    row_counts: tuple[int, ...]
    """Rows of each exported tensor; empty without a split by rows."""
    is_stacked: bool
    """Whether the tensor stacks experts; each exported tensor is then one index of the first dimension."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the exported tensors, by name."""
        if self.is_stacked:
            return dict.fromkeys(self.exported_names, self.shape[1:])
        if not self.row_counts:
            return {self.exported_names[0]: self.shape}
        return {name: (rows, *self.shape[1:]) for name, rows in zip(self.exported_names, self.row_counts, strict=True)}

    def with_replacements(self, replacements: NameReplacements) -> "TensorEntry":
        """Return a copy with the first text of each pair replaced by the second in the exported names."""
        names = self.exported_names
        for part, own_part in replacements:
            names = tuple(name.replace(part, own_part) for name in names)
        return self._replace(exported_names=names)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Split the model's tensor into the exported tensors; return them by name, as views."""
        parts: tuple[Tensor, ...] = (tensor,)
        if self.is_stacked:
            parts = tensor.unbind()
        elif self.row_counts:
            parts = torch.split(tensor, list(self.row_counts))
        return dict(zip(self.exported_names, parts, strict=True))

    def join(self, parts: list[Tensor]) -> Tensor:
        """Join the exported tensors, in the order of `exported_names`, into the model's tensor."""
        if self.is_stacked:
            return torch.stack(parts)
        return torch.cat(parts) if self.row_counts else parts[0]


def tensor_entries(spec: ModelSpec, replacements: NameReplacements = ()) -> list[list[TensorEntry]]:
    """Return the entries of all tensors of a model in groups: those outside the layers, then those of each layer."""
    # Only names and shapes are needed, so the model is created on the meta device, without values.
    with torch.device("meta"):
        model = Decoder(spec)
    return [
        [_create_entry(spec, name, tuple(t.shape)).with_replacements(replacements) for name, t in group.items()]
        for group in model.tensors_by_layer()
    ]


def _create_entry(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> TensorEntry:
    """Return the entry of a tensor from the only row of the table that matches its name."""
    [(name_match, pattern)] = [
        (match, exported_name)
        for pattern_regex, exported_name in _patterns(spec.backbone)
        if (match := pattern_regex.fullmatch(name))
    ]
    fields = name_match.groupdict()
    if "{qkv}" in pattern:
        row_counts = tuple(
            heads * spec.head_width for heads in (spec.attention_heads, spec.n_kv_heads, spec.n_kv_heads)
        )
        return TensorEntry(name, shape, tuple(pattern.format(qkv=part, **fields) for part in "qkv"), row_counts, False)
    if "{e}" in pattern:
        return TensorEntry(name, shape, tuple(pattern.format(e=e, **fields) for e in range(shape[0])), (), True)
    return TensorEntry(name, shape, (pattern.format(**fields),), (), False)


def _compile_pattern(checkpoint_name: str) -> re.Pattern[str]:
    """Return the regular expression for a checkpoint name, with a group for each placeholder."""
    return re.compile(
        "".join(_FIELD_PATTERNS.get(part, re.escape(part)) for part in re.split(r"(\{\w\})", checkpoint_name))
    )


@cache
def _patterns(backbone: ArchitectureName) -> list[tuple[re.Pattern[str], str]]:
    """Return the rows of the name table for an architecture: the compiled checkpoint name and the exported name."""
    return [
        (_compile_pattern(checkpoint_name), exported_name)
        for checkpoint_name, exported_name in (*NAME_TABLE, *ARCHITECTURES[backbone].tensor_names)
    ]
