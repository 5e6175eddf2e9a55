"""Resources that the kernels take with each entry of blocks.py, compiled for sm_90 without a GPU.

Run it as `python -m mhmoe_kernels.triton.resources [float32] [WIDTH ...]`. A stack of more than 0 bytes means spilled
registers.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhmoe_kernels.triton.fused.blocks import Kernel, blocks_for
from mhmoe_kernels.triton.fused.gelu import gelu_backward_rows, gelu_backward_weights, gelu_forward
from mhmoe_kernels.triton.fused.launch import kernel_options
from mhmoe_kernels.triton.fused.swiglu import swiglu_backward_rows, swiglu_backward_weights, swiglu_forward

KERNELS: dict[tuple[str, Kernel], triton.JITFunction] = {
    ("swiglu", "forward"): swiglu_forward,
    ("swiglu", "backward_rows"): swiglu_backward_rows,
    ("swiglu", "backward_weights"): swiglu_backward_weights,
    ("gelu", "forward"): gelu_forward,
    ("gelu", "backward_rows"): gelu_backward_rows,
    ("gelu", "backward_weights"): gelu_backward_weights,
}
# Largest number of bytes of shared memory that a block can use on sm_90.
SHARED_LIMIT = 227 * 1024
# Names of the arguments that point to int64 and to float32. All other pointers are to the weights' dtype.
_INTS = {"row_R", "expert_T", "start_T", "end_T", "offset_E1"}
_FLOATS = {"scale_R", "dscale_R", "mean_R", "rstd_R", "a_R", "c_R", "s_ED", "c_ED"}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def resources(kind: str, kernel: Kernel, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return registers and stack bytes per thread, shared bytes, and the number of matrix instructions of each kind.

    The kernel is compiled for sm_90 with its block sizes. All pointers, and f, are taken to be multiples of 16.
    """
    function = KERNELS[kind, kernel]
    constants = kernel_options(width, blocks_for(kind, kernel, width, dtype))
    compiler = {name: constants.pop(name) for name in _OPTIONS}
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys(_INTS, "*i64") | dict.fromkeys(_FLOATS, "*fp32") | {"F": "i32", "eps": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, element) for n in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(signature.items()) if t[0] == "*" or n == "F"}
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compiler)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    fields = dict(re.findall(r"(REG|STACK):(\d+)", dump.stdout))
    return {
        "registers": int(fields["REG"]),
        "stack": int(fields["STACK"]),
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "mma": compiled.asm["ptx"].count("mma.sync"),
    }


def main(arguments: list[str]) -> None:
    """Print a line of resources for each kernel at each width; the arguments are those of the command line."""
    dtype = torch.float32 if "float32" in arguments else torch.bfloat16
    for width in [int(a) for a in arguments if a.isdigit()] or [96, 128, 192, 256, 384, 768]:
        for kind, kernel in KERNELS:
            blocks = blocks_for(kind, kernel, width, dtype)
            usage = resources(kind, kernel, width, dtype)
            warning = "" if usage["shared"] <= SHARED_LIMIT else "  EXCEEDS the shared memory"
            print(f"{width:5} {kind:7}{kernel:17} {tuple(blocks)!s:17} {usage}{warning}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
