"""What each kernel can compute, and where. No torch: the spec refuses and the planner counts by the same entries that
the dispatcher in backends.py obeys."""

from typing import Literal, NamedTuple

ExpertFunction = Literal["swiglu", "gelu_subln"]
"""What a feed-forward layer or an expert computes; `weights.py` has the code."""
KernelName = Literal["auto", "grouped", "cpp", "triton", "megablocks", "capacity", "reference"]


class Abilities(NamedTuple):
    """Limits of a kernel; None where it takes anything."""

    device: Literal["CUDA", "CPUs"] | None = None
    precision: Literal["bfloat16"] | None = None
    function: ExpertFunction | None = None
    """The only function of experts that it computes."""
    sizes: int = 1
    """Widths of rows and of experts must be multiples of this."""
    widest_row: int | None = None
    auto_widest_row: int | None = None
    """Width of rows up to which `auto` prefers this kernel on GPUs, in bfloat16."""
    keeps: Literal["as told", "nothing", "all"] = "all"
    """Hidden rows of experts that it keeps for the backward; "as told" means that `moe.recompute` decides."""
    is_static: bool = False
    """Whether it lays out a limited number of places per expert (static routing) and needs to be told how many."""


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
