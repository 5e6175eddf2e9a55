"""The kernels that `auto` chooses on GPUs: one table, which the dispatcher and the planner read without torch.

On CPUs, `cpp.is_faster` decides.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from mhmoe_kernels.abilities import KERNELS, ExpertFunction, KernelName

TRITON_KERNELS: tuple[KernelName, ...] = ("grouped_gemm", "grouped_mm", "triton")
"""Kernels that sort routes by Triton kernels, and with which a layer may also route by a fused kernel."""

Purpose = Literal["training", "inference"]


class ExpertSizes(NamedTuple):
    """Sizes of experts that decide which kernel suits them."""

    function: ExpertFunction
    dtype: str
    """Dtype of the computation, such as bfloat16."""
    row_width: int
    hidden: int
    experts: int
    """Number of experts that one rank holds."""


class GpuChoice(NamedTuple):
    """Row of `GPU_CHOICES`: a kernel and the cases in which it is preferred within its own limits."""

    kernel: KernelName
    purposes: tuple[Purpose, ...]
    majors: tuple[int, ...] | None
    """Major numbers of compute capabilities; None for all GPUs."""
    dtypes: tuple[str, ...]
    evidence: str
    """Where the choice was measured, or why it is predicted."""
    max_row_width: int | None = None

    def applies(self, purpose: Purpose, major: int, sizes: ExpertSizes) -> bool:
        """Return whether this row is for these experts on a GPU of compute capability `major`.x."""
        return (
            purpose in self.purposes
            and (self.majors is None or major in self.majors)
            and sizes.dtype in self.dtypes
            and (self.max_row_width is None or sizes.row_width <= self.max_row_width)
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
"""Kernels by preference: `auto` chooses the first that applies and can run on the GPU."""


def limit_reason(kernel: KernelName, sizes: ExpertSizes) -> str | None:
    """Return in one line the limit of a kernel that forbids these experts, if any."""
    limits = KERNELS[kernel]
    if limits.functions is not None and sizes.function not in limits.functions:
        return f"kernel {kernel} computes {' and '.join(limits.functions)} experts, not {sizes.function}"
    if limits.precision not in (None, sizes.dtype):
        return f"kernel {kernel} computes in {limits.precision}, not in {sizes.dtype}"
    if sizes.row_width % limits.size_multiple or sizes.hidden % limits.size_multiple:
        return f"kernel {kernel} takes widths that are multiples of {limits.size_multiple}"
    for name, limit, size in (
        ("values in a row", limits.max_row_width, sizes.row_width),
        ("experts", limits.max_experts, sizes.experts),
    ):
        if limit is not None and size > limit:
            return f"kernel {kernel} takes up to {limit} {name}, not {size}"
    return None


def gpu_kernels(purpose: Purpose, major: int, sizes: ExpertSizes) -> Iterator[KernelName]:
    """Yield the kernels for experts on a GPU of compute capability `major`.x by preference."""
    for choice in GPU_CHOICES:
        if choice.applies(purpose, major, sizes) and limit_reason(choice.kernel, sizes) is None:
            yield choice.kernel
