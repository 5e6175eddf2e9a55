"""Products of rows, sorted by expert, with their experts' matrices, by Triton kernels or by torch."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from mhmoe_kernels.triton.grouped import operators as ops

Parts = tuple[Tensor, Tensor | None]
"""A tensor as the sum of one or two tensors."""


class Tiles(NamedTuple):
    """Tiles of rows that are sorted by expert, as in `SortedRoutes`."""

    offset_E1: Tensor
    expert_T: Tensor
    start_T: Tensor
    rows: int
    """Largest number of rows of a tile."""

    def arguments(self, transposed: bool) -> tuple[Tensor, Tensor, Tensor, bool, int]:
        """Return the last arguments of operator `grouped_linear`."""
        return self.offset_E1, self.expert_T, self.start_T, transposed, self.rows


@dataclass(frozen=True)
class Products:
    """Matrix products of sorted rows with their experts' matrices, by the Triton kernels of product.py."""

    skips_known_rows: ClassVar[bool] = True
    """True if `linear` takes known rows of its result instead of computing them."""
    tiles: Tiles

    def linear(
        self, x_RI: Tensor, w_EOI: Tensor, bias_EO: Tensor | None = None, known_PO: Tensor | None = None
    ) -> Tensor:
        """Return F.linear of each row with its expert's matrix and bias.

        `known_PO` are first rows of the result that need not be computed.
        """
        y_RO: Tensor = ops.grouped_linear(x_RI, w_EOI, None, None, bias_EO, known_PO, *self.tiles.arguments(True))
        return y_RO

    def backward(self, dy_RO: Tensor, w_EOI: Tensor) -> Tensor:
        """Return the gradient of the input rows of `linear`."""
        dx_RI: Tensor = ops.grouped_linear(dy_RO, w_EOI, None, None, None, None, *self.tiles.arguments(False))
        return dx_RI

    def backward_sum(self, dy_RO: Tensor, w_EOI: Tensor, dy2_RO: Tensor, w2_EOI: Tensor) -> Parts:
        """Return the gradient of rows that are the input of two products, as a sum."""
        return ops.grouped_linear(dy_RO, w_EOI, dy2_RO, w2_EOI, None, None, *self.tiles.arguments(False)), None

    def outer(self, dy_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Return the gradient of the matrices of `linear`."""
        dw_EOI: Tensor = ops.grouped_outer(dy_RO, x_RI, self.tiles.offset_E1)
        return dw_EOI


class TorchProducts(Products):
    """Products of sorted rows by torch's grouped_mm, which takes matrices without biases."""

    skips_known_rows = False

    def linear(
        self, x_RI: Tensor, w_EOI: Tensor, bias_EO: Tensor | None = None, known_PO: Tensor | None = None
    ) -> Tensor:
        assert bias_EO is None
        assert known_PO is None
        return self._product(x_RI, w_EOI, transposed=True)

    def backward(self, dy_RO: Tensor, w_EOI: Tensor) -> Tensor:
        return self._product(dy_RO, w_EOI, transposed=False)

    def backward_sum(self, dy_RO: Tensor, w_EOI: Tensor, dy2_RO: Tensor, w2_EOI: Tensor) -> Parts:
        return self.backward(dy_RO, w_EOI), self.backward(dy2_RO, w2_EOI)

    def outer(self, dy_RO: Tensor, x_RI: Tensor) -> Tensor:
        dw_EOI: Tensor = ops.torch_outer(dy_RO, x_RI, self.tiles.offset_E1)
        return dw_EOI

    def _product(self, x_RI: Tensor, w_EMN: Tensor, transposed: bool) -> Tensor:
        y_RO: Tensor = ops.torch_linear(x_RI, w_EMN, self.tiles.offset_E1, transposed)
        return y_RO
