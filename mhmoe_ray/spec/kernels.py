"""Kernels of experts by name, and what each can compute. The code of a name is in `mhmoe_kernels.BACKENDS`."""

from typing import Literal, NamedTuple

KernelName = Literal["auto", "grouped", "cpp", "triton", "megablocks", "capacity", "reference"]


FUSED_UP_TO = 256
"""Width of rows up to which `auto` is `triton` on GPUs, in bfloat16: `mhmoe_kernels.backends` has the same number."""


class KernelLimits(NamedTuple):
    """None where it takes any."""

    device: Literal["CUDA", "CPUs"] | None = None
    precision: Literal["bfloat16"] | None = None
    backbone: Literal["llama"] | None = None
    """Which has the experts that it computes."""
    sizes: int = 1
    """Widths of rows and of experts are multiples of it."""
    widest_row: int | None = None
    keeps: Literal["as told", "nothing", "all"] = "all"
    """Of the experts' hidden rows, for the backward; `MoESpec.recompute` tells."""


KERNELS: dict[KernelName, KernelLimits] = {
    "auto": KernelLimits(keeps="as told"),
    "grouped": KernelLimits(keeps="as told"),
    "cpp": KernelLimits(device="CPUs", precision="bfloat16", backbone="llama", sizes=2, keeps="nothing"),
    "triton": KernelLimits(device="CUDA", widest_row=1024, keeps="nothing"),
    "megablocks": KernelLimits(device="CUDA"),
    "capacity": KernelLimits(),
    "reference": KernelLimits(),
}
