"""The library MegaBlocks as a backend: its sort, histogram and copies of rows around a grouped GEMM, on CUDA only.

The operators are those of MegaBlocks' own dropless layer with `mlp_impl="grouped"` (Gale et al., "MegaBlocks", 2022).
Its padded operators serve block-sparse products, whose blocks of 128 x 128 values are too large for a small expert.
`megablocks` is imported at the first call, so that the base install does not need it.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.grouped import run_grouped, run_sorted
from mhmoe_kernels.weights import ExpertWeights, GeluSubln, Swiglu

Matmul = Callable[[Tensor, Tensor], Tensor]
"""Function (x_RI, w_EOI) -> y_RO: F.linear of sorted rows with their experts' matrices."""


def run_grouped_gemm(x_RD: Tensor, weights: ExpertWeights, matmul: Matmul) -> Tensor:
    """Compute `run_sorted` with grouped GEMMs, for experts for which `can_group` is True."""
    # This must run outside autocast. Autocast would make the output of a norm float32, and no grouped GEMM takes
    # operands of two dtypes.
    if isinstance(weights.function, Swiglu):
        gate_EFD, up_EFD, down_EDF = weights.stacked
        return matmul(F.silu(matmul(x_RD, gate_EFD)) * matmul(x_RD, up_EFD), down_EDF)
    assert isinstance(weights.function, GeluSubln)
    return _gelu_subln(matmul, weights.function.eps, x_RD, *weights.stacked)


def can_group(weights: ExpertWeights) -> bool:
    """Return whether rows of the matrices have multiples of 16 bytes, as grouped GEMMs require."""
    return all(w.shape[-1] * w.dtype.itemsize % 16 == 0 for w in weights.stacked if w.ndim == 3)


def _gelu_subln(
    matmul: Matmul,
    eps: float,
    x_RD: Tensor,
    fc1_EFD: Tensor,
    fc1_bias_EF: Tensor,
    norm_weight_EF: Tensor,
    norm_bias_EF: Tensor,
    fc2_EDF: Tensor,
    fc2_bias_ED: Tensor,
) -> Tensor:
    # Each row gets its expert's vector (a bias, or a weight of the norm) as the product of a one with a matrix that has
    # this vector as its column. The gradient, a sum over the expert's rows, is then a grouped GEMM too, which sums in
    # float32; the gradient of indexing would be summed in bfloat16. Eight columns make rows of 16 bytes, the alignment
    # of a grouped GEMM.
    one_R8 = F.pad(x_RD.new_ones(x_RD.shape[0], 1), (0, 7))

    def to_rows(v_EF: Tensor) -> Tensor:
        return matmul(one_R8, F.pad(v_EF[..., None], (0, 7)))

    hidden_RF = matmul(x_RD, fc1_EFD) + to_rows(fc1_bias_EF)
    normed_RF = F.layer_norm(F.gelu(hidden_RF), hidden_RF.shape[1:], eps=eps)
    return matmul(normed_RF * to_rows(norm_weight_EF) + to_rows(norm_bias_EF), fc2_EDF) + to_rows(fc2_bias_ED)


_INSTALL_COMMAND = "pip install --no-deps --no-build-isolation --no-cache-dir megablocks==0.10.0 stanford-stk==0.7.1"


def run(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run `mhmoe_kernels.run_experts` with MegaBlocks; ValueError for too many rows (32-bit indices).

    A loop over experts computes the products if `can_group` is False or the dtype is float64; otherwise the package
    grouped_gemm, if it is installed and the dtype is bfloat16 (the host then waits for the counts), or else
    `F.grouped_mm`.

    MegaBlocks rounds each gated output to the dtype of x before it adds the K outputs of a row, and gradients of gates
    likewise. It copies rows in float32, so float64 results have the precision of float32.
    """
    (N, D), K = x_ND.shape, expert_NK.shape[1]
    if N * K * D >= 2**31:
        raise ValueError(
            f"megablocks indexes with 32 bits, but {N} rows x {K} experts x width {D} are 2^31 elements or more: "
            "make the micro-batch smaller, or use the kernel 'grouped'"
        )
    if N == 0:
        # Without rows, MegaBlocks is not called: there is nothing to permute, and its documentation does not state
        # whether its kernels can be launched without blocks.
        return run_grouped(x_ND, expert_NK, gate_NK, weights)
    ops, E = _import_module("megablocks.ops"), len(weights.stacked[0])
    with torch.no_grad():
        expert_R, route_R = ops.sort(expert_NK.flatten().int(), max((E - 1).bit_length(), 1))
        count_E = ops.histogram(expert_R, E)
        # With one expert, MegaBlocks returns a scalar, which `view` turns into a vector.
        end_E = ops.inclusive_cumsum(count_E, 0).view(E)
    # MegaBlocks' operations that copy rows assume contiguous tensors.
    x_RD = ops.gather(x_ND.contiguous(), route_R, expert_R, end_E, K)
    out_RD = _run_sorted_rows(x_RD, count_E, end_E, weights).contiguous()
    y_ND: Tensor = ops.scatter(out_RD, route_R, expert_R, gate_NK.flatten(), end_E, K)
    return y_ND


def unavailable_reason(device: torch.device) -> str | None:
    """Return the reason why `run` cannot run on `device`, in one line; None if it can."""
    if device.type != "cuda":
        return f"megablocks needs CUDA; the device is {device.type}"
    if not torch.cuda.is_available():
        return "megablocks needs CUDA, and torch finds none here"
    return _missing_dependency()


def _missing_dependency() -> str | None:
    for module, package in (("triton", "triton"), ("stk", "stanford-stk"), ("megablocks", "megablocks")):
        if find_spec(module) is None:
            return f"{package} is not installed: {'pip install triton' if package == 'triton' else _INSTALL_COMMAND}"
    if find_spec("megablocks_ops") is None:
        reinstall_command = _INSTALL_COMMAND.replace("install", "install --force-reinstall")
        return (
            "megablocks was built without its CUDA extension megablocks_ops: with nvcc and a CUDA build of torch, "
            f"{reinstall_command} (with CUDA 13, see kernels/README.md)"
        )
    try:
        _import_module("megablocks.ops")
    except ImportError as error:
        # Typically the extension was compiled for another version of torch, so that a symbol is missing.
        line, _, _ = str(error).partition("\n")
        return f"megablocks cannot be imported: {line}"
    return None


@cache
def _import_module(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # Neither warning concerns the user: `_grouped_matmul` handles a missing grouped_gemm, and torch.jit.script
        # occurs in a part of MegaBlocks that is not used here.
        warnings.filterwarnings("ignore", "Grouped GEMM not available")
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", DeprecationWarning)
        return importlib.import_module(name)


def _run_sorted_rows(x_RD: Tensor, count_E: Tensor, end_E: Tensor, weights: ExpertWeights) -> Tensor:
    if x_RD.dtype == torch.float64 or not can_group(weights):
        return run_sorted(x_RD, count_E.cpu(), weights)
    return run_grouped_gemm(x_RD, weights, _grouped_matmul(x_RD, count_E, end_E))


def _grouped_matmul(x_RD: Tensor, count_E: Tensor, end_E: Tensor) -> Matmul:
    package = _import_module("megablocks.grouped_gemm_util")
    if package.grouped_gemm_is_available() and x_RD.dtype == torch.bfloat16:
        counts = count_E.long().cpu()
        return lambda x_RI, w_EOI: package.ops.gmm(x_RI, w_EOI.contiguous(), counts, trans_b=True)
    return lambda x_RI, w_EOI: F.grouped_mm(x_RI, w_EOI.transpose(-2, -1), offs=end_E)
