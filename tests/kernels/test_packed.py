"""Tests of packed matrices and experts against plain ones, and of a row's independence of all other rows."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from mhmoe_kernels import GeluSubln, Swiglu, packed, run_experts
from mhmoe_kernels.cpu import CpuLevel, cpu_level, is_x86
from mhmoe_kernels.packed import PackedMatrix, PaddedMatrix, run_packed
from tests.kernels.problems import make_problem

PACKED_SIZES = [(384, 1024), (96, 200), (32, 16), (64, 300), (1024, 4), (384, 8), (3, 200), (8, 1024)]
"""Widths and outputs of matrices, with those of adapters of rank 3, 4 and 8."""
PADDED_SIZES = [(96, 200), (200, 96)]
FUNCTIONS = [Swiglu(), GeluSubln()]
LEVELS = {torch.float32: CpuLevel.AVX2, torch.bfloat16: CpuLevel.AVX512_BF16}
"""Lowest CPU level at which each dtype is packed on an x86; on other CPUs, float32 is packed if torch has oneDNN."""
LEVEL_DTYPES = [dtype for dtype in LEVELS if (cpu_level() >= LEVELS[dtype] if is_x86() else dtype == torch.float32)]
DTYPES = LEVEL_DTYPES if torch._C._has_mkldnn else []
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 129, 300)

# Padded matrices serve CPUs on which nothing is packed, so their tests run there too.
MATRICES = [
    pytest.param(PackedMatrix, marks=pytest.mark.skipif(not DTYPES, reason="oneDNN packs nothing here")),
    PaddedMatrix,
]

pytestmark = pytest.mark.cpu


def packed_experts(weights, matrix):
    """Return the functions of all experts with packed or padded matrices."""
    return [
        packed.pack_layer(weights.function, expert_weights, lambda _, weight, bias: matrix(weight, bias))
        for expert_weights in zip(*(w.unbind() for w in weights.stacked), strict=True)
    ]


def test_supported_dtypes_can_be_packed():
    assert [packed.unavailable_reason(dtype) for dtype in DTYPES] == [None] * len(DTYPES)
    assert packed.unavailable_reason(torch.float64) == "oneDNN cannot pack torch.float64"


@pytest.mark.parametrize("dtype", LEVELS)
@pytest.mark.parametrize("level", CpuLevel)
def test_dtype_is_packed_from_its_cpu_level(monkeypatch, dtype, level):
    monkeypatch.setattr(packed, "is_x86", lambda: True)
    monkeypatch.setattr(packed, "cpu_level", lambda: level)
    assert (packed.unavailable_reason(dtype) is None) == (level >= LEVELS[dtype])


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("n", [0, 1, 7, 40])
@pytest.mark.parametrize("function", FUNCTIONS)
@torch.no_grad()
def test_packed_experts_match_reference(function, n, matrix):
    x, expert, gate, weights = make_problem(
        n, n, d=24, f=40, e=5, k=2, dtype=torch.float32, n_used=4, function=function
    )
    weights = weights._replace(function=function)
    actual = run_packed(x, expert, gate, packed_experts(weights, matrix))
    torch.testing.assert_close(actual, run_experts("reference", x, expert, gate, weights), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("matrix", "sizes", "dtype"),
    [*product([PackedMatrix], PACKED_SIZES, DTYPES), *product([PaddedMatrix], PADDED_SIZES, LEVELS)],
)
@torch.no_grad()
def test_product_row_is_bitwise_independent_of_row_count(matrix, sizes, dtype, threads):
    width, outputs = sizes
    g = torch.Generator().manual_seed(width)
    weight, bias = torch.randn(outputs, width, generator=g).to(dtype), torch.randn(outputs, generator=g)
    x = torch.randn(max(COUNTS), width, generator=g)
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = matrix(weight, bias)
        all_outputs = matrix(x)
        for count in COUNTS:
            for start in (0, 37):
                rows = x[start : start + count]
                assert torch.equal(matrix(rows), all_outputs[start : start + count]), (count, start)
    finally:
        torch.set_num_threads(previous_threads)
    expected = F.linear(x.to(dtype).double(), weight.double(), bias.to(dtype).double())
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(all_outputs.double(), expected, atol=tolerance * width**0.5, rtol=tolerance)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("function", FUNCTIONS)
@torch.no_grad()
def test_expert_output_is_bitwise_independent_of_other_rows(function, matrix):
    x, expert, gate, weights = make_problem(3, 60, d=96, f=200, e=6, k=2, dtype=torch.float32, function=function)
    experts = packed_experts(weights._replace(function=function), matrix)
    all_outputs = run_packed(x, expert, gate, experts)
    for rows in ([0], [59], [3, 4, 5], [*range(10, 27)]):
        assert torch.equal(run_packed(x[rows], expert[rows], gate[rows], experts), all_outputs[rows])
