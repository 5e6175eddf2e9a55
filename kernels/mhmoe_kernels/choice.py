"""The kernels that `auto` chooses on GPUs: one table, which the dispatcher and the planner read.

This module does not import torch. CPUs are decided in `cpp` and `grouped`, by the level of the CPU.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from mhmoe_kernels.abilities import KERNELS, ExpertFunction, KernelName

Purpose = Literal["training", "inference"]


class ExpertSizes(NamedTuple):
    """Sizes of experts that decide which kernel suits them."""

    function: ExpertFunction
    dtype: str
    """Name of the dtype of the computation, such as bfloat16."""
    row_width: int
    hidden: int
    """Hidden width of an expert."""
    experts: int
    """Number of experts of a rank."""

    @property
    def is_aligned(self) -> bool:
        """True if rows of the experts' matrices are multiples of 16 bytes, as torch's grouped_mm needs."""
        value_bytes = 2 if self.dtype in ("bfloat16", "float16") else 4
        return self.row_width * value_bytes % 16 == 0 and self.hidden * value_bytes % 16 == 0


class GpuChoice(NamedTuple):
    """Row of the table: a kernel, where it applies, and how it is known to be the best there."""

    kernel: KernelName
    purposes: tuple[Purpose, ...]
    majors: tuple[int, ...] | None
    """Major numbers of compute capabilities; None for all."""
    dtypes: tuple[str, ...]
    evidence: str
    """Where the choice was measured, or why it is predicted."""
    max_row_width: int | None = None
    function: ExpertFunction | None = None
    needs_alignment: bool = False

    def applies(self, purpose: Purpose, major: int, sizes: ExpertSizes) -> bool:
        """Return whether the row is about these experts on such a GPU."""
        return (
            purpose in self.purposes
            and (self.majors is None or major in self.majors)
            and sizes.dtype in self.dtypes
            and (self.max_row_width is None or sizes.row_width <= self.max_row_width)
            and self.function in (None, sizes.function)
            and (sizes.is_aligned or not self.needs_alignment)
        )


GPU_CHOICES: tuple[GpuChoice, ...] = (
    GpuChoice(
        "triton",
        ("inference",),
        (9,),
        ("bfloat16",),
        "predicted: the hidden layer of narrow rows stays on the chip; its blocks are those of an H100",
        max_row_width=256,
    ),
    GpuChoice(
        "grouped_mm",
        ("training", "inference"),
        (9, 10),
        ("bfloat16",),
        "predicted: CUTLASS reaches more of the peak than Triton; on other GPUs it waits for the host (pytorch#186620)",
        function="swiglu",
        needs_alignment=True,
    ),
    GpuChoice(
        "grouped_gemm",
        ("training", "inference"),
        None,
        ("bfloat16", "float32"),
        "predicted: the host never waits, and the launches do not depend on the number of experts",
    ),
    GpuChoice(
        "grouped",
        ("training", "inference"),
        None,
        ("bfloat16", "float32", "float16", "float64"),
        "the only one for these dtypes; the host waits in each layer",
    ),
)
"""Rows in the order of preference. The first row that applies, and whose kernel can run on the GPU, is chosen."""


def gpu_kernels(purpose: Purpose, major: int, sizes: ExpertSizes) -> Iterator[KernelName]:
    """Yield the kernels for experts on a GPU, the preferred one first.

    Args:
        purpose: training or inference.
        major: major number of the GPU's compute capability.
        sizes: sizes of the experts.
    """
    for choice in GPU_CHOICES:
        limits = KERNELS[choice.kernel]
        is_narrow = limits.max_row_width is None or sizes.row_width <= limits.max_row_width
        if is_narrow and choice.applies(purpose, major, sizes):
            yield choice.kernel
