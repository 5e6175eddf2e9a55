"""Limits of each kernel of experts: device, dtype and sizes.

The spec's checks, the planner's counts and the dispatcher in backends.py read them, the first two without torch.
"""

from typing import Literal, NamedTuple

ExpertFunction = Literal["swiglu", "gelu_subln", "gelu"]
"""Name of the function that a feed-forward layer or an expert computes (weights.py)."""
KernelName = Literal[
    "auto", "grouped", "cpp", "triton", "grouped_gemm", "grouped_mm", "megablocks", "capacity", "reference"
]


class KernelLimits(NamedTuple):
    """Limits of a kernel of experts; None where it has no limit."""

    device: Literal["CUDA", "CPUs"] | None = None
    precision: Literal["bfloat16"] | None = None
    functions: tuple[ExpertFunction, ...] | None = None
    """Only expert functions that the kernel computes."""
    size_multiple: int = 1
    """Number of which widths of rows and hidden widths of experts must be multiples."""
    max_row_width: int | None = None
    max_experts: int | None = None
    """Largest number of experts that one rank may hold."""
    kept_rows: Literal["as configured", "nothing", "all"] = "all"
    """Hidden activations that the kernel keeps for the backward; "as configured" means that `moe.recompute` decides."""
    is_static: bool = False
    """True if the kernel needs a fixed number of slots per expert (static routing)."""


_LANGUAGE_FUNCTIONS: tuple[ExpertFunction, ...] = ("swiglu", "gelu_subln")

KERNELS: dict[KernelName, KernelLimits] = {
    "auto": KernelLimits(kept_rows="as configured"),
    "grouped": KernelLimits(kept_rows="as configured"),
    # bfloat16 matrix units read values in pairs, so sizes must be even.
    "cpp": KernelLimits(
        device="CPUs", precision="bfloat16", functions=("swiglu",), size_multiple=2, kept_rows="nothing"
    ),
    # Rows wider than 1024 values do not fit into the GPU's on-chip memory (see triton/fused/blocks.py).
    "triton": KernelLimits(device="CUDA", functions=_LANGUAGE_FUNCTIONS, max_row_width=1024, kept_rows="nothing"),
    "grouped_gemm": KernelLimits(device="CUDA", functions=_LANGUAGE_FUNCTIONS, kept_rows="as configured"),
    # torch's grouped_mm has no biases, needs rows whose size is a multiple of 16 bytes, and takes fewer than 1024
    # groups.
    "grouped_mm": KernelLimits(
        device="CUDA",
        precision="bfloat16",
        functions=("swiglu",),
        size_multiple=8,
        max_experts=1023,
        kept_rows="as configured",
    ),
    "megablocks": KernelLimits(device="CUDA", functions=_LANGUAGE_FUNCTIONS),
    "capacity": KernelLimits(is_static=True),
    "reference": KernelLimits(),
}
