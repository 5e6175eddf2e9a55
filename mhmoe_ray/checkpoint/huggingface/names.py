"""Names of a checkpoint's tensors in an exported folder, read in both directions.

The table here has the names that all architectures share; an architecture adds those of its feed-forward layers.

Where Hugging Face's Mixtral checkpoints have the tensor, the name is theirs. Where they lack it, the name has the same
form, and is the field's own where there is one (torchscale's for the subln backbone and X-MoE's router, DeepSeek's for
the selection bias). Shapes are those of the model, except for two splits that a placeholder on the right asks for:

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
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import ModelSpec

# fmt: off
TABLE: tuple[tuple[str, str], ...] = (
    # in a run's checkpoint                       in an exported folder
    ("embedding.weight",                          "model.embed_tokens.weight"),
    ("norm.{p}",                                  "model.norm.{p}"),
    ("output.weight",                             "lm_head.weight"),

    ("blocks.{i}.attention_norm.{p}",             "model.layers.{i}.input_layernorm.{p}"),
    ("blocks.{i}.attention.qkv.{p}",              "model.layers.{i}.self_attn.{qkv}_proj.{p}"),
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

_FIELDS = {"{i}": r"(?P<i>\d+)", "{n}": r"(?P<n>\d+)", "{p}": "(?P<p>weight|bias)"}


class Entry(NamedTuple):
    """One tensor of the model and the exported tensors that it consists of, in order."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    """Number of rows of each exported tensor; empty where tensors are not split by rows."""
    stacked: bool
    """Whether exported tensors lack the first dimension, because each of them is one index of it."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the exported tensors, by name."""
        if self.stacked:
            return dict.fromkeys(self.theirs, self.shape[1:])
        if not self.rows:
            return {self.theirs[0]: self.shape}
        return {name: (rows, *self.shape[1:]) for name, rows in zip(self.theirs, self.rows, strict=True)}

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the exported tensors by name, as views of the model's tensor."""
        parts: tuple[Tensor, ...] = (tensor,)
        if self.stacked:
            parts = tensor.unbind()
        elif self.rows:
            parts = torch.split(tensor, list(self.rows))
        return dict(zip(self.theirs, parts, strict=True))

    def join(self, parts: list[Tensor]) -> Tensor:
        """Return the model's tensor, made from the exported ones in the order of `theirs`."""
        if self.stacked:
            return torch.stack(parts)
        return torch.cat(parts) if self.rows else parts[0]


def entries(spec: ModelSpec) -> list[list[Entry]]:
    """Return all tensors of a model, in groups: those outside the layers, then those of each layer."""
    with torch.device("meta"):
        model = Decoder(spec)
    groups: list[list[Entry]] = [[] for _ in range(1 + spec.layers)]
    for name, tensor in model.tensors().items():
        _, block, rest = name.partition("blocks.")
        groups[1 + int(rest.split(".")[0]) if block else 0].append(_entry(spec, name, tuple(tensor.shape)))
    return groups


def _entry(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> Entry:
    [(found, pattern)] = [
        (match, theirs) for ours, theirs in _patterns(spec.backbone) if (match := ours.fullmatch(name))
    ]
    fields = found.groupdict()
    if "{qkv}" in pattern:
        rows = tuple(heads * spec.head_width for heads in (spec.attention_heads, spec.n_kv_heads, spec.n_kv_heads))
        return Entry(name, shape, tuple(pattern.format(qkv=part, **fields) for part in "qkv"), rows, False)
    if "{e}" in pattern:
        return Entry(name, shape, tuple(pattern.format(e=e, **fields) for e in range(shape[0])), (), True)
    return Entry(name, shape, (pattern.format(**fields),), (), False)


def _compiled(ours: str) -> re.Pattern[str]:
    return re.compile("".join(_FIELDS.get(part, re.escape(part)) for part in re.split(r"(\{\w\})", ours)))


@cache
def _patterns(backbone: ArchitectureName) -> list[tuple[re.Pattern[str], str]]:
    """Return the patterns and exported names that all architectures share, then those of this architecture."""
    return [(_compiled(ours), theirs) for ours, theirs in (*TABLE, *ARCHITECTURES[backbone].tensor_names)]
