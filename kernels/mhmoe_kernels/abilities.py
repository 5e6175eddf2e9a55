"""Limits of each kernel and the hardware it runs on. No torch: the spec's checks, the planner's counts and the
dispatcher in backends.py use the same entries."""

from typing import Literal, NamedTuple

ExpertFunction = Literal["swiglu", "gelu_subln"]
"""Name of the function that a feed-forward layer or an expert computes; `weights.py` implements it."""
KernelName = Literal["auto", "grouped", "cpp", "triton", "megablocks", "capacity", "reference"]


class Abilities(NamedTuple):
    """Limits of a kernel; None where it has no limit."""

    device: Literal["CUDA", "CPUs"] | None = None
    precision: Literal["bfloat16"] | None = None
    function: ExpertFunction | None = None
    """The only expert function that the kernel computes."""
    sizes: int = 1
    """Number that widths of rows and of experts must be multiples of."""
    widest_row: int | None = None
    auto_widest_row: int | None = None
    """Largest row width for which `auto` prefers this kernel on GPUs in bfloat16."""
    keeps: Literal["as told", "nothing", "all"] = "all"
    """Hidden rows of experts that the kernel keeps for the backward; "as told" means that `moe.recompute` decides."""
    is_static: bool = False
    """Whether the kernel lays out a limited number of slots per expert (static routing) and needs that number."""


KERNELS: dict[KernelName, Abilities] = {
    "auto": Abilities(keeps="as told"),
    "grouped": Abilities(keeps="as told"),
    "cpp": Abilities(device="CPUs", precision="bfloat16", function="swiglu", sizes=2, keeps="nothing"),
    # By its roofline (kernels/README.md) the fused kernel should be ahead up to 256; not measured yet.
    "triton": Abilities(device="CUDA", widest_row=1024, auto_widest_row=256, keeps="nothing"),
    "megablocks": Abilities(device="CUDA"),
    "capacity": Abilities(is_static=True),
    "reference": Abilities(),
}
