"""Packed models for inference: their matrices are stored as engines multiply them, and the original ones are freed.

The rows of a step may belong to requests of several adapters. Each matrix multiplies all rows at once; then an adapter
adds its low-rank product to its own rows, so that a row's result depends on no other row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_kernels.packed import RowFunction, RowGroups, RowLayer, pack_layer, run_packed
from mhmoe_ray.model.adapter import MatrixSum
from mhmoe_ray.model.decoder import Block, Decoder
from mhmoe_ray.model.feedforward import Dispatch, Experts, FeedForward, SharedExpert
from mhmoe_ray.model.router import NO_CONTEXT, BaseRouter, Router, Routing, RoutingContext

PackMatrix = Callable[[Tensor, Tensor | None], RowFunction]
"""Function (matrix, bias) such as `PackedMatrix`, for CPUs that pack matrices, or `PaddedMatrix`."""


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """Adapter whose low-rank products are added to those of a packed model."""

    digest: bytes
    """Hash of its weights, with which the hashes of its KV-cache blocks begin."""
    products: dict["ServedMatrix", RowFunction]


AdapterPart = tuple[str, MatrixSum, Tensor, Tensor]
"""Full name of a parameter, the adapter of it or of some of its rows, and the adapter's A and B."""


class MatrixPart(NamedTuple):
    """Rows of a served matrix that are a parameter of the model, or one expert's part of it."""

    name: str
    width: int
    expert: int | None = None


class ServedMatrix:
    """Matrix of a packed model, and the parameters of which it consists, one below the other."""

    def __init__(self, matrix: RowFunction, dtype: torch.dtype, parts: Sequence[MatrixPart]) -> None:
        self._matrix, self._dtype, self._parts = matrix, dtype, parts

    def __call__(self, x_NI: Tensor, groups: RowGroups = ()) -> Tensor:
        """Multiply rows, which belong to groups of adapters or None."""
        y_NO, end = self._matrix(x_NI), 0
        for adapter, count in groups:
            start, end = end, end + count
            if count and adapter and (product := adapter.products.get(self)):
                y_NO[start:end] += product(x_NI[start:end])
        return y_NO

    def low_rank_product(
        self, parts_by_name: Mapping[str, Sequence[AdapterPart]], pack: PackMatrix
    ) -> RowFunction | None:
        """Return the function x -> scale * B A x of an adapter of this matrix, if it has one."""
        a_matrices: list[Tensor] = []
        blocks: list[tuple[slice, Tensor]] = []
        start = 0
        for part in self._parts:
            for _, matrix_sum, a, b in parts_by_name.get(part.name, ()):
                if part.expert is not None:
                    a, b = a[part.expert], b[part.expert]
                rows = range(start, start + part.width)[matrix_sum.rows]
                a_matrices.append(a)
                blocks.append((slice(rows.start, rows.stop), b * matrix_sum.scale))
            start += part.width
        if not blocks:
            return None
        a_ZI, column = torch.cat(a_matrices), 0
        b_OZ = a_ZI.new_zeros(start, len(a_ZI))
        for block_rows, block in blocks:
            b_OZ[block_rows, column : column + block.shape[1]] = block
            column += block.shape[1]
        a_function, b_function = (pack(matrix.to(self._dtype), None) for matrix in (a_ZI, b_OZ))
        return lambda x_NI: b_function(a_function(x_NI))


class StepRows:
    """The adapters of a step's tokens, which all modules of a packed model read."""

    def __init__(self) -> None:
        self._groups: list[tuple[ServedAdapter | None, int]] = []
        self._token_count = 1

    def set(self, groups: Sequence[tuple[ServedAdapter | None, int]]) -> None:
        """Set the adapter of each group of consecutive tokens of the next step, and the number of tokens."""
        has_adapter = any(adapter for adapter, _ in groups)
        self._groups, self._token_count = list(groups) if has_adapter else [], sum(count for _, count in groups)

    def groups(self, row_count: int) -> RowGroups:
        """Return the groups of rows of tokens or sub-tokens."""
        rows_per_token = row_count // self._token_count
        return [(adapter, count * rows_per_token) for adapter, count in self._groups]


class PackedLayer(nn.Module):
    """A linear layer, or a dense feed-forward layer, with packed matrices."""

    def __init__(self, function: RowFunction, rows: StepRows) -> None:
        super().__init__()
        self._function, self._rows = function, rows

    def forward(self, x: Tensor, generator: None = None) -> Tensor:
        x_NI = x.flatten(0, -2)
        y_NO = self._function(x_NI, self._rows.groups(len(x_NI)))
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


class PackedExperts(nn.Module):
    """All experts of a layer with packed matrices, in place of `Experts`; one process holds all of them."""

    def __init__(self, experts: Sequence[RowLayer], rows: StepRows) -> None:
        super().__init__()
        self._experts, self._rows = experts, rows

    def forward(
        self, x_ND: Tensor, routing: Routing, dispatch: Dispatch, shared: SharedExpert | None
    ) -> tuple[Tensor, None]:
        assert shared is None, "without other ranks, the layer computes its shared expert itself"
        groups = self._rows.groups(len(x_ND))
        return run_packed(x_ND, routing.expert_NK, routing.gate_NK, self._experts, groups), None


class InferenceRouter(BaseRouter):
    """A router that chooses the same experts as in training, without losses and statistics that only training needs."""

    def __init__(self, router: Router, scores: ServedMatrix, rows: StepRows) -> None:
        super().__init__(router.moe)
        self._router, self._scores, self._rows = router, scores, rows
        self._empty_tensor = torch.zeros(0)

    def forward(
        self, x_ND: Tensor, generator: torch.Generator | None = None, context: RoutingContext = NO_CONTEXT
    ) -> Routing:
        # The scores stay float32 even if the model computes in bfloat16, as in training.
        with torch.autocast(x_ND.device.type, enabled=False):
            logit_NE = self._scores(widen(x_ND), self._rows.groups(len(x_ND)))
            expert_NK, gate_NK, _probability = self._router.choose_experts(logit_NE)
        empty_tensor = self._empty_tensor
        return Routing(expert_NK, gate_NK, empty_tensor, empty_tensor, empty_tensor, empty_tensor, None)


class PackedModel:
    """Packed modules of a decoder, to which adapters are added."""

    def __init__(self, model: Decoder, pack: PackMatrix) -> None:
        """Replace the modules of a model by packed ones, in place; it can then be neither trained nor saved.

        The model has all experts, and its matrices have the data type in which products are computed.
        """
        self.rows = StepRows()
        self._pack, self._device = pack, model.embedding.weight.device
        self._matrices: list[ServedMatrix] = []
        for number, block in enumerate(cast("list[Block]", model.blocks)):
            path = f"blocks.{number}"
            self._pack_linears(block.attention, f"{path}.attention")
            if (moe := block.moe) is not None:
                router = cast("Router", moe.router)
                part = MatrixPart(f"{path}.moe.router.scores.weight_ED", router.moe.experts)
                scores = self._add(ServedMatrix(router.scores, torch.float32, [part]))
                moe.router = InferenceRouter(router, scores, self.rows)
                moe.experts = self._pack_experts(moe.experts, f"{path}.moe.experts")  # type: ignore[assignment]  # called like `Experts`
                if moe.shared is not None:
                    moe.shared = self._pack_feed_forward(moe.shared, f"{path}.moe.shared")  # type: ignore[assignment]  # called like it
                self._pack_linears(moe, f"{path}.moe")
            if block.ffn is not None:
                block.ffn = self._pack_feed_forward(block.ffn, f"{path}.ffn")  # type: ignore[assignment]  # called like it
        # With tied embeddings the model has no output layer, so one with the embedding's matrix is made.
        weight = (model.embedding if model.output is None else model.output).weight
        output = PackedLayer(self._pack_matrix([MatrixPart("output.weight", len(weight))], weight, None), self.rows)
        model.output = output  # type: ignore[assignment]  # called like a linear layer

    def pack_adapter(self, digest: bytes, parts: Iterable[AdapterPart]) -> ServedAdapter:
        """Return an adapter for the model's matrices."""
        parts_by_name: dict[str, list[AdapterPart]] = {}
        for name, matrix_sum, a, b in parts:
            part = (name, matrix_sum, a.to(self._device), b.to(self._device))
            parts_by_name.setdefault(name, []).append(part)
        products = ((matrix, matrix.low_rank_product(parts_by_name, self._pack)) for matrix in self._matrices)
        return ServedAdapter(digest, {matrix: product for matrix, product in products if product})

    def _add(self, matrix: ServedMatrix) -> ServedMatrix:
        self._matrices.append(matrix)
        return matrix

    def _pack_matrix(self, parts: Sequence[MatrixPart], weight: Tensor, bias: Tensor | None) -> ServedMatrix:
        return self._add(ServedMatrix(self._pack(weight, bias), weight.dtype, parts))

    def _pack_layer(
        self, layer: FeedForward | Experts, weights: Sequence[Tensor], path: str, expert: int | None
    ) -> RowLayer:
        names = [f"{path}.{name}" for name, _ in layer.named_parameters()]

        def make_matrix(positions: tuple[int, ...], weight: Tensor, bias: Tensor | None) -> ServedMatrix:
            parts = [MatrixPart(names[position], len(weights[position]), expert) for position in positions]
            return self._pack_matrix(parts, weight, bias)

        return pack_layer(layer.function, weights, make_matrix)

    def _pack_feed_forward(self, layer: FeedForward, path: str) -> PackedLayer:
        return PackedLayer(self._pack_layer(layer, tuple(layer.parameters()), path, None), self.rows)

    def _pack_experts(self, experts: Experts, path: str) -> PackedExperts:
        expert_weights = zip(*(p.unbind() for p in experts.parameters()), strict=True)
        layers = [self._pack_layer(experts, weights, path, number) for number, weights in enumerate(expert_weights)]
        return PackedExperts(layers, self.rows)

    def _pack_linears(self, module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            child_path = f"{path}.{name}"
            if isinstance(child, nn.Linear):
                part = MatrixPart(f"{child_path}.weight", child.out_features)
                setattr(module, name, PackedLayer(self._pack_matrix([part], child.weight, child.bias), self.rows))
            else:
                self._pack_linears(child, child_path)
