"""The compiled experts against `reference` in float64, and the reasons given where they cannot be compiled."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mhmoe_kernels import ExpertWeights, GeluSubln, Swiglu, choose, cpp, run_experts, run_sorted_experts
from mhmoe_kernels.cpu import CpuLevel, cpu_level, level_environment
from tests.kernels.problems import outputs_and_gradients, problem, with_gradients

CPU = torch.device("cpu")
HAS_COMPILER = bool(os.environ.get("CXX") or shutil.which("g++"))
COMPILES = sys.platform == "linux" and cpu_level() >= CpuLevel.AVX512_BF16 and HAS_COMPILER
"""Whether the kernel must compile here, judged by the machine.

Judged by what the kernel says of itself, a kernel that does not compile would only be skipped.
"""
runs_here = pytest.mark.skipif(not COMPILES, reason="needs Linux, a CPU with AVX512_BF16, and g++")
pytestmark = pytest.mark.cpu


def rounded(seed, n, d, f, e, k, only=None):
    """Return a problem in bfloat16 with values as a layer has them, and the same problem in float64."""
    x, expert, gate, w = problem(seed, n, d, f, e, k, only=only)
    stacked = [(t.detach() / t.shape[-1] ** 0.5).bfloat16() for t in w.stacked]
    x, gate = x.detach().bfloat16(), gate.detach().float()

    def of(dtype, gate_dtype):
        weights = ExpertWeights(Swiglu(), tuple(t.to(dtype).requires_grad_() for t in stacked))
        return x.to(dtype).requires_grad_(), expert, gate.to(gate_dtype).requires_grad_(), weights

    return of(torch.bfloat16, torch.float32), of(torch.float64, torch.float64)


def error(found, exact):
    """Return the norm of the difference divided by the norm of `exact`."""
    return (found.double() - exact).norm() / exact.norm() if exact.norm() else found.double().norm()


@runs_here
def test_where_a_machine_can_run_it_it_is_compiled():
    assert cpp.why_not(CPU) is None


@runs_here
@settings(max_examples=60)
@given(
    # Of a few values alone, roundings do not even out.
    seed=st.integers(0, 2**20), n=st.just(0) | st.integers(16, 700), d=st.integers(4, 40), f=st.integers(8, 130),
    e=st.integers(1, 7), data=st.data(), threads=st.integers(1, 4),
)  # fmt: skip
@example(seed=0, n=1100, d=192, f=150, e=2, data=None, threads=2)  # more rows than a block has
@example(seed=1, n=1100, d=200, f=150, e=2, data=None, threads=2)  # and of the wider kind
def test_agrees_with_reference_with_empty_experts_among_them(seed, n, d, f, e, data, threads):
    only = data.draw(st.integers(1, e), label="experts with rows") if data else e
    k = data.draw(st.integers(1, only), label="k") if data else 1
    ours, exact = rounded(seed, n, 2 * d, 2 * f, e, k, only)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = outputs_and_gradients("cpp", *ours)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, outputs_and_gradients("reference", *exact), strict=True):
        # Rounding alone is 3e-3; the loss' direction, which is rounded before both, is not in it.
        assert error(a, b) < 1.2e-2
        assert a.dtype == (torch.float32 if a.shape == ours[2].shape else torch.bfloat16)


@runs_here
def test_is_nearer_to_float64_than_reference_in_bfloat16():
    ours, exact = rounded(5, n=600, d=128, f=376, e=4, k=2)
    oracle = outputs_and_gradients("reference", *exact)
    rounding = outputs_and_gradients("reference", *ours)
    for a, b, c in zip(outputs_and_gradients("cpp", *ours), rounding, oracle, strict=True):
        assert error(a, c) < 1.05 * error(b, c)


@runs_here
@pytest.mark.parametrize("count_E", [[3, 0, 4, 1], [0, 0, 0, 2], [0, 0, 0, 0]])
def test_sorted_rows_go_through_the_experts_they_are_counted_for(count_E):
    (x, _, _, w), _ = rounded(4, n=sum(count_E), d=6, f=10, e=4, k=1)
    experts = (tuple(t[e] for t in w.stacked) for e in range(4))
    expected = torch.cat([Swiglu()(rows, *expert) for rows, expert in zip(x.split(count_E), experts, strict=True)])
    found = run_sorted_experts("cpp", x, count_E, w)
    for ours, oracle in zip(with_gradients(found, w.stacked), with_gradients(expected, w.stacked), strict=True):
        torch.testing.assert_close(ours, oracle, atol=2e-2, rtol=2e-2)


@runs_here
def test_a_row_comes_out_the_same_whatever_is_beside_it_bit_for_bit():
    (x, _, _, w), _ = rounded(6, n=300, d=64, f=100, e=3, k=1)
    together = run_sorted_experts("cpp", x, [100, 0, 200], w)
    assert torch.equal(together[:7], run_sorted_experts("cpp", x[:7], [7, 0, 0], w))
    with torch.no_grad():
        x[150] = torch.nan
    spoilt = run_sorted_experts("cpp", x, [100, 0, 200], w)
    assert spoilt[150].isnan().all()
    others = torch.arange(300) != 150
    assert torch.equal(spoilt[others], together[others])


@runs_here
def test_the_same_input_gives_the_same_bits():
    ours, _ = rounded(7, n=800, d=64, f=500, e=3, k=2)
    for a, b in zip(outputs_and_gradients("cpp", *ours), outputs_and_gradients("cpp", *ours), strict=True):
        assert torch.equal(a, b)


@runs_here
@pytest.mark.parametrize("size", [30, 1e3, 1e10])
def test_gates_far_from_zero_are_open_or_shut(size):
    """silu(g) is g or 0 at such gates, with gradients to match, while e^-g is beyond float32."""
    (x, _, _, w), (exact_x, _, _, exact) = rounded(8, n=64, d=32, f=64, e=1, k=1)
    with torch.no_grad():
        x *= size
        exact_x *= size
        exact_x.copy_(x)
    found = with_gradients(run_sorted_experts("cpp", x, [64], w), [x, *w.stacked])
    oracle = with_gradients(run_sorted_experts("reference", exact_x, [64], exact), [exact_x, *exact.stacked])
    for a, b in zip(found, oracle, strict=True):
        assert error(a, b) < 1.2e-2


@runs_here
def test_needs_no_gradients():
    (x, expert, gate, w), _ = rounded(9, n=5, d=8, f=8, e=2, k=2)
    with torch.inference_mode():
        assert run_experts("cpp", x, expert, gate, w).shape == x.shape


@pytest.mark.parametrize(
    ("change", "kind", "why"),
    [
        ({"dtype": torch.float32}, TypeError, "bfloat16 only"),
        ({"d": 7}, ValueError, "even sizes only: rows are 7 wide, experts 8"),
        ({"f": 9}, ValueError, "even sizes only: rows are 6 wide, experts 9"),
        ({"function": GeluSubln()}, ValueError, "SwiGLU experts only"),
    ],
)
def test_refuses_what_it_does_not_compute_on_any_machine(change, kind, why):
    sizes = {"n": 4, "d": 6, "f": 8, "e": 2, "k": 1, "dtype": torch.bfloat16} | change
    with pytest.raises(kind, match=why):
        run_experts("cpp", *problem(0, **sizes))


@runs_here
def test_auto_takes_it_on_a_matrix_unit_for_what_it_computes(monkeypatch):
    (x, _, _, w), (exact_x, _, _, exact) = rounded(0, n=4, d=6, f=8, e=2, k=1)
    monkeypatch.setattr(cpp, "cpu_level", lambda: CpuLevel.AMX)
    assert choose("auto", x, w) == "cpp"
    assert choose("auto", exact_x, exact) == "grouped"
    monkeypatch.setattr(cpp, "cpu_level", lambda: CpuLevel.AVX512_BF16)
    assert choose("auto", x, w) == "grouped"
    assert choose("cpp", x, w) == "cpp"


NO_BFLOAT16 = "this CPU multiplies no bfloat16 (AVX512_BF16, or AMX)"
SAY = "import torch; from mhmoe_kernels import cpp; print(cpp.why_not(torch.device('cpu')))"


def start(cache, **environment):
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.Popen([sys.executable, "-c", SAY], env=variables, stdout=subprocess.PIPE, text=True)


def said(process):
    out, _ = process.communicate()
    assert process.returncode == 0
    return out.strip()


@runs_here
def test_processes_that_compile_at_once_leave_one_library_which_later_ones_load(tmp_path):
    assert [said(p) for p in [start(tmp_path), start(tmp_path)]] == ["None", "None"]
    [library] = (tmp_path / "mhmoe").iterdir()
    built = library.stat()
    assert said(start(tmp_path)) == "None"
    assert library.stat() == built


@runs_here
def test_a_compiler_that_fails_is_a_reason_in_one_line(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    why = said(start(tmp_path, CXX=str(compiler)))
    assert why == f"{compiler} fails: x.cpp:1: error: no such thing"
    assert list((tmp_path / "mhmoe").iterdir()) == []


@runs_here
def test_a_library_that_cannot_be_loaded_is_a_reason_too(tmp_path):
    """Examples are a cache without permission to execute, and a cache of a machine with another C library."""
    assert said(start(tmp_path)) == "None"
    [library] = (tmp_path / "mhmoe").iterdir()
    library.unlink()
    library.write_text("no library")
    assert said(start(tmp_path)) == f"what was compiled cannot be loaded: {library}: file too short"


@runs_here
def test_a_library_that_cannot_be_moved_to_its_place_is_a_reason_too(tmp_path):
    compiler = tmp_path / "c++"  # a folder is in its place
    in_the_way = '[ "$1" = -shared ] && mkdir -p "$(dirname "$(dirname "$4")")/$(basename "$4")/x"'
    compiler.write_text(f'#!/bin/sh\n{in_the_way}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    assert said(start(tmp_path, CXX=str(compiler))).startswith("what was compiled cannot be kept: ")


@runs_here
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "", "PATH": "/nowhere"}, "there is no g++: install one, or name a compiler in CXX"),
        ({"CXX": "/nowhere/g++"}, "/nowhere/g++ does not run: No such file or directory"),
    ],
)
def test_without_a_compiler_it_says_so(tmp_path, environment, why):
    assert said(start(tmp_path, **environment)) == why


@pytest.mark.parametrize("level", [level for level in CpuLevel if level < CpuLevel.AVX512_BF16])
def test_a_lesser_cpu_is_a_reason_and_auto_is_grouped_there(tmp_path, level):
    if sys.platform == "linux":
        assert said(start(tmp_path, **level_environment(level))) == NO_BFLOAT16
    code = (
        "import torch; from mhmoe_kernels import choose; from tests.kernels.problems import problem;"
        "x, *_, weights = problem(0, n=4, d=6, f=8, e=2, k=1, dtype=torch.bfloat16); print(choose('auto', x, weights))"
    )
    environment = {**os.environ, **level_environment(level)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "grouped"


def test_a_level_that_there_is_not_is_a_reason(tmp_path):
    if sys.platform == "linux":
        assert said(start(tmp_path, MHMOE_CPU_LEVEL="sse9")).startswith("MHMOE_CPU_LEVEL is 'sse9', but levels are ")


def test_it_is_for_cpus():
    assert cpp.why_not(torch.device("meta")) == "kernel cpp is for CPUs, and this is meta"
