"""Resources that the compiled kernels use on a GPU: registers, shared memory, spills and traps. No GPU is needed.

`python -m mhmoe_kernels.triton.resources [sm_90 ...] [WIDTH ...]` prints a table; WIDTH is a width of rows.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhmoe_kernels.triton import adamw, router, rows, sort
from mhmoe_kernels.triton.fused import gelu as fused_gelu
from mhmoe_kernels.triton.fused import swiglu as fused_swiglu
from mhmoe_kernels.triton.fused.blocks import Kernel, blocks_for
from mhmoe_kernels.triton.fused.operators import kernel_options
from mhmoe_kernels.triton.grouped import gelu, product, swiglu
from mhmoe_kernels.triton.grouped.blocks import ROW_BLOCKS, linear_blocks, outer_blocks
from mhmoe_kernels.triton.routing import product_constants

SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a program can have, by compute capability without its dot."""
MAX_SPILLED_BYTES = 64
"""Bytes per thread that a kernel may spill to memory; with more, its block sizes count as badly chosen."""

WIDTH, HIDDEN, NARROW = 2048, 856, 192
"""Widths for which grouped products are compiled: of rows, of hidden layers, and one with narrow blocks. 856 is not a
multiple of 16."""

_INT64 = {"expert_NK", "count_E", "dropped", "received_PX"}
_INT32 = {
    "route_R", "slot_NK", "slot_KN", "slot_R", "offset_E1", "expert_T", "start_T", "count_BE", "before_BE", "total_E",
    "first_PE", "count_PE",
}  # fmt: skip
_FLOAT32 = {
    "mean_R", "rstd_R", "scale_S", "dscale_S", "gate_NK", "kept_gate_NK", "dgate_NK", "a_R", "c_R", "s_ED", "c_ED",
    "logits_NE", "dlogits_NE", "log_sum_N", "probability_PE", "z_P", "share_E", "balance", "z", "dbalance", "dz",
    "weight_V", "gradient_V",
}  # fmt: skip
"""Arguments that point to float32 values in any dtype of the computation. Those in `_INT64` and `_INT32` point to
integers, and others with an underscore to values in that dtype."""
_SCALARS = {"eps", "scale", "decay", "step_size", "mean_share", "square_factor", "square_share", "correction"}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

_FUSED: dict[tuple[str, Kernel], triton.JITFunction] = {
    ("swiglu", "forward"): fused_swiglu.swiglu_forward,
    ("swiglu", "backward_rows"): fused_swiglu.swiglu_backward_rows,
    ("swiglu", "backward_weights"): fused_swiglu.swiglu_backward_weights,
    ("gelu", "forward"): fused_gelu.gelu_forward,
    ("gelu", "backward_rows"): fused_gelu.gelu_backward_rows,
    ("gelu", "backward_weights"): fused_gelu.gelu_backward_weights,
}


class Build(NamedTuple):
    """A kernel with the constants and compiler options of one of its launches."""

    name: str
    function: triton.JITFunction
    constants: dict[str, Any]
    float32_arguments: tuple[str, ...] = ()
    """Arguments that point to float32 values in this launch, beside those that always do."""


class ResourceUsage(NamedTuple):
    """Resources that a compiled kernel needs on a GPU."""

    registers: int
    spilled_bytes: int
    """Bytes per thread kept in memory for want of registers."""
    shared_bytes: int
    matrix_instructions: int


def fused_builds(kind: str, width: int, dtype: torch.dtype) -> Iterator[Build]:
    """Yield the kernels of fused experts of a kind (`swiglu` or `gelu`) for rows of a width."""
    for (own_kind, kernel), function in _FUSED.items():
        if own_kind == kind:
            options = kernel_options(64, 8, width, HIDDEN, blocks_for(kind, kernel, width, dtype))
            yield Build(f"{kind} {kernel}", function, options)


def grouped_builds(capability: int, dtype: torch.dtype) -> Iterator[Build]:
    """Yield the kernels of grouped products in all variants that training and inference launch."""
    variants: dict[str, tuple[int, int, dict[str, bool]]] = {
        "gate": (WIDTH, HIDDEN, {"TRANSPOSED": True}),
        "gate of known rows": (WIDTH, HIDDEN, {"TRANSPOSED": True, "HAS_KNOWN_ROWS": True}),
        "down": (HIDDEN, WIDTH, {"TRANSPOSED": True}),
        "down with a bias": (HIDDEN, WIDTH, {"TRANSPOSED": True, "HAS_BIAS": True}),
        "backward of gate": (HIDDEN, WIDTH, {}),
        "backward of gate and up": (HIDDEN, WIDTH, {"HAS_SECOND": True}),
        "backward of down": (WIDTH, HIDDEN, {}),
        "narrow": (WIDTH, NARROW, {"TRANSPOSED": True}),
    }
    flags = dict.fromkeys(("TRANSPOSED", "HAS_SECOND", "HAS_BIAS", "HAS_KNOWN_ROWS"), False)
    for block_rows, (variant, (in_width, out_width, own_flags)) in itertools.product(ROW_BLOCKS, variants.items()):
        block = linear_blocks(block_rows, out_width, dtype, capability)
        constants = {
            "IN": in_width, "OUT": out_width, "E": 64, "IS_EVEN": in_width % block.inner == 0,
            "BLOCK_ROWS": block_rows, "BLOCK_OUT": block.out, "BLOCK_IN": block.inner,
            "num_warps": block.warps, "num_stages": block.stages,
        }  # fmt: skip
        yield Build(f"linear {block_rows} {variant}", product.grouped_linear, {**constants, **flags, **own_flags})
    for name, sizes in {"of gate": (HIDDEN, WIDTH), "of down": (WIDTH, HIDDEN), "narrow": (NARROW, NARROW)}.items():
        block_out, block = outer_blocks(*sizes, dtype, capability)
        blocks = {"BLOCK_ROWS": block.inner, "BLOCK_OUT": block_out, "BLOCK_IN": block.out}
        options = {"num_warps": block.warps, "num_stages": block.stages}
        constants = {"OUT": sizes[0], "IN": sizes[1], "E": 64}
        yield Build(f"outer {name}", product.grouped_outer, {**constants, **blocks, **options})


def small_builds() -> Iterator[Build]:
    """Yield the small kernels for typical sizes: activations and norms, sort and gather of routes, and the router."""
    blocks = {"F": HIDDEN, "BLOCK_R": 4, "BLOCK_F": 512}
    yield Build("swiglu", swiglu.swiglu_forward, {"BLOCK": 1024})
    yield Build("swiglu backward", swiglu.swiglu_backward, blocks)
    yield Build("gelu and norm", gelu.gelu_norm_forward, {"E": 64, **blocks})
    yield Build("gelu and norm backward", gelu.gelu_norm_backward, {"D": WIDTH, "E": 64, **blocks})
    sums = {"F": HIDDEN, "BLOCK_R": 32, "BLOCK_F": 128}
    yield Build("sums of the norm", gelu.norm_sums, sums)
    yield Build("sums of rows", gelu.row_sums, {"HAS_SCALES": True, **sums})
    yield Build("gather", rows.gather_rows, {"D": WIDTH, "K": 8, "BLOCK_R": 16, "BLOCK_D": 256})
    yield Build(
        "combine",
        rows.combine_rows,
        {"D": WIDTH, "K": 8, "HAS_SECOND": True, "HAS_GATES": True, "BLOCK_N": 16, "BLOCK_D": 256},
    )
    yield Build("AdamW", adamw.update, {"BLOCK": 1024, "enable_fp_fusion": False})
    for name, sizes, transposed, float32_arguments in (
        ("logits", (None, 296, 512), (False, True), ("b_KN", "c_SMN")),
        ("logits to rows", (None, 512, 296), (False, False), ("a_MK", "b_KN")),
        ("logits to matrix", (296, 512, None), (True, False), ("a_MK", "c_SMN")),
    ):
        yield Build(f"route: {name}", router.multiply, product_constants(sizes, transposed), float32_arguments)
    route_block = sort.ROUTES_PER_BLOCK
    for experts in (1, 300, 1024):
        columns = max(16, triton.next_power_of_2(experts))
        choices = {"K": min(8, experts), "E": experts}
        order = {"BY_CHOICE": True, "BLOCK": route_block, **choices}
        bins = max(16, triton.next_power_of_2(experts + 1))
        yield Build(f"sort: counts, E {experts}", sort.count_routes, {**order, "BINS": bins})
        yield Build(f"sort: sums, E {experts}", sort.add_counts, {"E": experts, "BLOCK_B": 128, "BLOCK_E": 16})
        tiles = {"E": experts, "BLOCK_ROWS": 128, "BLOCK_T": 32, "BLOCK_E": columns}
        yield Build(f"sort: tiles, E {experts}", sort.schedule_tiles, tiles)
        yield Build(f"sort: places, E {experts}", sort.place_routes, order)
        received = {"X": max(1, experts // 8), "PX": experts, "BLOCK": 256, "BLOCK_PX": columns}
        yield Build(f"sort: received, E {experts}", sort.place_received, received)
        routing = {**choices, "NORMALIZED": True, "BLOCK_E": columns}
        forward = {**routing, "BLOCK_N": max(1, 4096 // columns), "BLOCK_K": triton.next_power_of_2(choices["K"])}
        yield Build(f"route, E {experts}", router.route_rows, forward)
        backward = {**routing, "HAS_DROPS": True, "BLOCK_N": max(1, 2048 // columns)}
        yield Build(f"route backward, E {experts}", router.route_rows_backward, backward)
        programs = {**choices, "COUNTS_FIRST": False, "BLOCK_P": max(1, 8192 // columns), "BLOCK_E": columns}
        yield Build(f"route: sums, E {experts}", router.sum_programs, programs)
        yield Build(f"route: drops, E {experts}", router.drop_routes, {**choices, "BLOCK": 1024, "BLOCK_E": columns})


def compile_build(build: Build, capability: int, dtype: torch.dtype) -> Any:
    """Compile a kernel for float32 or bfloat16 and a GPU of a compute capability such as 90, without that GPU."""
    constants = dict(build.constants)
    options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys(constants, "constexpr") | dict.fromkeys(build.float32_arguments, "*fp32")
    signature = {name: types.get(name) or _argument_type(name, element) for name in build.function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(build.function, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def refusal(compiled: Any, shared_limit: int) -> str | None:
    """Return in one clause why a kernel from `compile_build` cannot run on a GPU; None if it can."""
    # A `trap` instruction, which would end the kernel with an error, means that the compiler could not translate a part
    # of it.
    if re.search(r"^\s*trap;", compiled.asm["ptx"], re.M):
        return "Triton compiles it to a trap for this GPU"
    if compiled.metadata.shared > shared_limit:
        return f"it needs {compiled.metadata.shared} bytes of shared memory, and this GPU has {shared_limit}"
    return None


def usage(compiled: Any) -> ResourceUsage:
    """Return the resources of a compiled kernel, as cuobjdump of the Triton package reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    fields = dict(re.findall(r"(REG|STACK):(\d+)", dump.stdout))
    code = compiled.asm["ptx"]
    return ResourceUsage(
        registers=int(fields["REG"]),
        spilled_bytes=int(fields["STACK"]),
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=sum(map(code.count, ("wgmma.mma_async", "mma.sync", "tcgen05.mma"))),
    )


def _argument_type(name: str, element: str) -> str:
    kinds = {"fp32": _SCALARS, "*i64": _INT64, "*i32": _INT32, "*fp32": _FLOAT32, "*i1": {"kept_NK"}, "i64": {"offset"}}
    for kind, names in kinds.items():
        if name in names:
            return kind
    return element if "_" in name else "i32"


@cache
def fused_refusal(kind: str, width: int, dtype: torch.dtype, capability: int, shared_limit: int) -> str | None:
    """Return in one clause why fused experts cannot run on a GPU with `shared_limit` bytes of shared memory a program;
    None if they can. The first call compiles them."""
    for build in fused_builds(kind, width, dtype):
        if reason := refusal(compile_build(build, capability, dtype), shared_limit):
            return f"{build.name} for rows of {width}: {reason}"
    return None


def main(arguments: list[str]) -> None:
    """Print a line of resources for each kernel."""
    capabilities = [int(a.removeprefix("sm_")) for a in arguments if a.startswith("sm_")] or [90]
    widths = [int(a) for a in arguments if not a.startswith("sm_")] or [96, 128, 192, 256, 384, 768]
    for capability in capabilities:
        fused = [build for width in widths for kind in ("swiglu", "gelu") for build in _with_width(kind, width)]
        for build in (*grouped_builds(capability, torch.bfloat16), *small_builds(), *fused):
            compiled = compile_build(build, capability, torch.bfloat16)
            warning = refusal(compiled, SHARED_LIMITS[capability]) or ""
            print(f"sm_{capability} {build.name:32} {tuple(usage(compiled))!s:28} {warning}", flush=True)


def _with_width(kind: str, width: int) -> Iterator[Build]:
    for build in fused_builds(kind, width, torch.bfloat16):
        yield build._replace(name=f"{build.name} {width}")


if __name__ == "__main__":
    main(sys.argv[1:])
