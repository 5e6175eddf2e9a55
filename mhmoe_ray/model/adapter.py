"""Low-rank adapters of a decoder's matrices (`train.adapter`), beside weights that stay frozen.

A module with adapters keeps the names of its weights. The adapters of a matrix have names beside it:

    attention.qkv.weight    attention.qkv.lora_a_q_ZI, lora_b_q_OZ, and with k and v for keys and values
    attention.out.weight    attention.out.lora_a_ZI, lora_b_OZ; head and merge projections alike
    experts.gate_EFD        experts.lora_a_gate_EZD, lora_b_gate_EFZ; dense layers alike, without E
    scores.weight_ED        scores.lora_a_ZD, lora_b_EZ
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import Adapted, GeluSubln, Swiglu, widen
from mhmoe_ray.model.attention import Attention
from mhmoe_ray.model.autocast import DTYPES
from mhmoe_ray.model.decoder import Block
from mhmoe_ray.model.feedforward import CastingModule, Experts
from mhmoe_ray.model.linear import Linear, Projection
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.model.noise import dropout
from mhmoe_ray.model.router import Router
from mhmoe_ray.model.router.base import BaseScores
from mhmoe_ray.model.router.scores import LinearScores
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec.adapter import AdapterSpec, AdapterTarget

MARK = "lora_"
"""Start of the names of an adapter's tensors within their module."""


def is_adapter(name: str) -> bool:
    """Return whether a tensor of a model, by its full name, belongs to an adapter."""
    return name.rpartition(".")[2].startswith(MARK)


class AdaptedMatrix(NamedTuple):
    """Rows of a matrix, or of a stack of matrices, and the names of the adapter's tensors in the same module."""

    name: str
    rows: slice
    a_name: str
    b_name: str


class ModuleAdapter(NamedTuple):
    """The adapters of a module's matrices, each multiplied by `scale`."""

    matrices: list[AdaptedMatrix]
    scale: float


def _add_adapter(module: nn.Module, name: str, suffix: str, rank: int, rows: slice = slice(None)) -> AdaptedMatrix:
    """Register the parameters of an adapter for rows of matrix `name`, whose names end with `suffix`."""
    weight = getattr(module, name)
    *stack, out_width, in_width = weight.shape
    out_width = len(range(out_width)[rows])
    stem, _, letters = suffix.rpartition("_")
    stem, stack_letters, out_letter, in_letter = stem and f"{stem}_", letters[:-2], letters[-2], letters[-1]
    matrix = AdaptedMatrix(
        name, rows, f"{MARK}a_{stem}{stack_letters}Z{in_letter}", f"{MARK}b_{stem}{stack_letters}{out_letter}Z"
    )
    # The weight may be narrower, but adapters are trained in float32.
    wide_weight = widen(weight)
    module.register_parameter(matrix.a_name, nn.Parameter(wide_weight.new_empty(*stack, rank, in_width)))
    module.register_parameter(matrix.b_name, nn.Parameter(wide_weight.new_empty(*stack, out_width, rank)))
    return matrix


class AdaptedLinear(Linear):
    """Linear layer with an adapter for each of some ranges of its rows."""

    def __init__(self, linear: Linear, parts: dict[str, slice], rank: int, scale: float, dropout_rate: float) -> None:
        """Take over a layer's parameters. `parts` has the ranges of rows by name; "" names the only one."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device)
        self.weight, self.bias = linear.weight, linear.bias
        matrices = [
            _add_adapter(self, "weight", f"{name}_OI" if name else "OI", rank, rows) for name, rows in parts.items()
        ]
        self.adapter, self.dropout_rate = ModuleAdapter(matrices, scale), dropout_rate

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        matrices, scale = self.adapter
        hidden = F.linear(
            dropout(x, self.dropout_rate, generator), torch.cat([getattr(self, m.a_name) for m in matrices])
        )
        y, sums, end = super().forward(x), [], 0
        for matrix, hidden_part in zip(matrices, hidden.chunk(len(matrices), -1), strict=True):
            rows = range(self.out_features)[matrix.rows]
            # Rows without an adapter get zeros.
            sums += [hidden.new_zeros(*x.shape[:-1], rows.start - end)] if rows.start > end else []
            sums.append(F.linear(hidden_part, getattr(self, matrix.b_name)))
            end = rows.stop
        sums += [hidden.new_zeros(*x.shape[:-1], self.out_features - end)] if self.out_features > end else []
        return y + torch.cat(sums, -1) * scale


class AdaptedScores(BaseScores):
    """Logits of a linear router with an adapter."""

    def __init__(self, scores: LinearScores, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.weight_ED = scores.weight_ED
        self.adapter = ModuleAdapter([_add_adapter(self, "weight_ED", "ED", rank)], scale)

    def forward(self, x_ND: Tensor) -> Tensor:
        [matrix], scale = self.adapter
        a_ZD, b_EZ = (widen(getattr(self, name)) for name in (matrix.a_name, matrix.b_name))
        return x_ND @ widen(self.weight_ED).T + x_ND @ a_ZD.T @ b_EZ.T * scale


class _Adapters(NamedTuple):
    """Settings of the adapters of a model."""

    targets: list[AdapterTarget]
    rank: int
    scale: float
    dropout_rate: float

    def adapt_linear(self, linear: Linear, parts: dict[str, slice] | None = None) -> AdaptedLinear:
        return AdaptedLinear(linear, parts or {"": slice(None)}, self.rank, self.scale, self.dropout_rate)

    def adapt_function(self, module: CastingModule, target: AdapterTarget) -> None:
        """Add an adapter to each matrix of a feed-forward layer or a stack of experts, if it is a target."""
        if target not in self.targets and not isinstance(module, Experts):
            return
        assert isinstance(module.function, Swiglu | GeluSubln)
        positions, matrices = [], []
        for position, (name, parameter) in enumerate(list(module.named_parameters())):
            if target in self.targets and parameter.ndim - isinstance(module, Experts) == 2:
                positions.append(position)
                matrices.append(_add_adapter(module, name, name, self.rank))
        # Frozen experts without an adapter get a function too, whose backward skips their gradients.
        module.function = Adapted(module.function, tuple(positions), self.scale)
        module.adapter = ModuleAdapter(matrices, self.scale)

    def adapt_attention(self, attention: Attention) -> None:
        queries, keys = attention.heads * attention.width, attention.kv_heads * attention.width
        ends = (0, queries, queries + keys, queries + 2 * keys)
        part_targets: dict[str, AdapterTarget] = {"q": "query", "k": "key", "v": "value"}
        rows = {part: slice(*edges) for part, edges in zip(part_targets, pairwise(ends), strict=True)}
        if parts := {part: rows[part] for part, target in part_targets.items() if target in self.targets}:
            attention.qkv = self.adapt_linear(attention.qkv, parts)
        if "out" in self.targets:
            attention.out = self.adapt_linear(attention.out)

    def adapt_mixture(self, layer: MultiHeadMoE) -> None:
        self.adapt_function(layer.experts, "experts")
        if layer.shared is not None:
            self.adapt_function(layer.shared, "shared")
        if "projections" in self.targets:
            layer.head, layer.merge = (self.adapt_projection(module) for module in (layer.head, layer.merge))
        if "router" in self.targets:
            router = layer.router
            assert isinstance(router, Router)
            assert isinstance(router.scores, LinearScores)
            router.scores = AdaptedScores(router.scores, self.rank, self.scale)

    def adapt_projection(self, module: nn.Module) -> nn.Module:
        """Return a linear layer, or the linear layers of a projection, with adapters; any other module as it is."""
        if isinstance(module, Projection):
            return Projection(*(self.adapt_projection(layer) for layer in module))
        return self.adapt_linear(module) if isinstance(module, Linear) else module


def add_adapters(model: Trunk, spec: AdapterSpec) -> None:
    """Freeze the weights of a decoder on the meta device, and add the adapters of a spec to it."""
    model.requires_grad_(False)
    if spec.base_precision != "float32":
        for module in model.modules():
            if isinstance(module, nn.Linear | CastingModule):
                module.to(DTYPES[spec.base_precision])
    model.is_random |= spec.dropout > 0
    adapters = _Adapters(spec.matched_targets(model.spec), spec.rank, spec.alpha / spec.rank, spec.dropout)
    for module in list(model.modules()):
        if isinstance(module, Block):
            adapters.adapt_attention(module.attention)
            if module.ffn is not None:
                adapters.adapt_function(module.ffn, "feed_forward")
        elif isinstance(module, MultiHeadMoE):
            adapters.adapt_mixture(module)


class MatrixSum(NamedTuple):
    """Adapter of rows of a tensor, by the full names of its tensors."""

    rows: slice
    a_name: str
    b_name: str
    scale: float

    def add_to(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        """Add the adapter to a matrix or a stack of matrices, in place; products are computed in float32 or wider."""
        # Both are stacks, if the weight is one.
        rows = weight[..., self.rows, :]
        rows.copy_(widen(rows) + widen(b) @ widen(a) * self.scale)


def matrix_sums(model: Trunk) -> Iterator[tuple[str, MatrixSum]]:
    """Yield the full name of each matrix with an adapter, or of a part of it, and the adapter."""
    for path, module in model.named_modules():
        if not isinstance(module, AdaptedLinear | AdaptedScores | CastingModule) or module.adapter is None:
            continue
        for matrix in module.adapter.matrices:
            a_name, b_name = (f"{path}.{name}" for name in (matrix.a_name, matrix.b_name))
            yield f"{path}.{matrix.name}", MatrixSum(matrix.rows, a_name, b_name, module.adapter.scale)
