"""Tests of kernel `cpp` against `reference` in float64, and of the reasons why it is unavailable."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mhmoe_kernels import ExpertWeights, GeluSubln, Swiglu, choose_kernel, cpp, run_experts, run_sorted_experts
from mhmoe_kernels.cpu import CpuLevel, level_environment
from tests.kernels.problems import make_problem, outputs_and_gradients, with_gradients
from tests.support.cpp_kernel import runs_here

CPU = torch.device("cpu")
pytestmark = pytest.mark.cpu


def make_bfloat16_problem(seed, n, d, f, e, k, n_used=None):
    """Return the arguments of a kernel in bfloat16, with weights as small as a layer's, and the same values in float64.

    The gates of the former are float32.
    """
    x, expert, gate, w = make_problem(seed, n, d, f, e, k, n_used=n_used)
    stacked = [(t.detach() / t.shape[-1] ** 0.5).bfloat16() for t in w.stacked]
    x, gate = x.detach().bfloat16(), gate.detach().float()

    def in_dtype(dtype, gate_dtype):
        weights = ExpertWeights(Swiglu(), tuple(t.to(dtype).requires_grad_() for t in stacked))
        return x.to(dtype).requires_grad_(), expert, gate.to(gate_dtype).requires_grad_(), weights

    return in_dtype(torch.bfloat16, torch.float32), in_dtype(torch.float64, torch.float64)


def relative_error(actual, exact):
    """Return the norm of the difference divided by the norm of `exact`."""
    return (actual.double() - exact).norm() / exact.norm() if exact.norm() else actual.double().norm()


@runs_here
def test_kernel_compiles_on_capable_machine():
    assert cpp.unavailable_reason(CPU) is None


@runs_here
@settings(max_examples=60)
@given(
    # n is 0 or at least 16, because rounding errors of few values do not average out.
    seed=st.integers(0, 2**20), n=st.just(0) | st.integers(16, 700), d=st.integers(4, 40), f=st.integers(8, 130),
    e=st.integers(1, 7), data=st.data(), threads=st.integers(1, 4),
)  # fmt: skip
# Each of the two experts gets some 550 rows, more than a block of 512.
@example(seed=0, n=1100, d=192, f=150, e=2, data=None, threads=2)
@example(seed=1, n=1100, d=200, f=150, e=2, data=None, threads=2)  # the same with wider rows
def test_matches_reference_with_empty_experts(seed, n, d, f, e, data, threads):
    n_used = data.draw(st.integers(1, e), label="experts with rows") if data else e
    k = data.draw(st.integers(1, n_used), label="k") if data else 1
    inputs, exact_inputs = make_bfloat16_problem(seed, n, 2 * d, 2 * f, e, k, n_used)
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = outputs_and_gradients("cpp", *inputs)
    finally:
        torch.set_num_threads(previous_threads)
    rounded_results = outputs_and_gradients("reference", *inputs)
    exact_results = outputs_and_gradients("reference", *exact_inputs)
    for a, rounded, exact in zip(results, rounded_results, exact_results, strict=True):
        # Rounding alone gives an error of 3e-3. Gradients also have the rounding error of the weights in the loss
        # (`direction` in `with_gradients`). That error is larger if there are few values, and the reference has it too.
        assert relative_error(a, exact) < 1.2e-2 + relative_error(rounded, exact)
        assert a.dtype == (torch.float32 if a.shape == inputs[2].shape else torch.bfloat16)


@runs_here
def test_error_is_at_most_that_of_bfloat16_reference():
    inputs, exact_inputs = make_bfloat16_problem(5, n=600, d=128, f=376, e=4, k=2)
    expected = outputs_and_gradients("reference", *exact_inputs)
    rounded_results = outputs_and_gradients("reference", *inputs)
    for a, b, c in zip(outputs_and_gradients("cpp", *inputs), rounded_results, expected, strict=True):
        assert relative_error(a, c) < 1.05 * relative_error(b, c)


@runs_here
@pytest.mark.parametrize("count_E", [[3, 0, 4, 1], [0, 0, 0, 2], [0, 0, 0, 0]])
def test_sorted_rows_run_through_their_experts(count_E):
    (x, _, _, w), _ = make_bfloat16_problem(4, n=sum(count_E), d=6, f=10, e=4, k=1)
    experts = (tuple(t[e] for t in w.stacked) for e in range(4))
    expected = torch.cat([Swiglu()(rows, *expert) for rows, expert in zip(x.split(count_E), experts, strict=True)])
    outputs = run_sorted_experts("cpp", x, count_E, w)
    for result, expected_result in zip(
        with_gradients(outputs, w.stacked), with_gradients(expected, w.stacked), strict=True
    ):
        torch.testing.assert_close(result, expected_result, atol=2e-2, rtol=2e-2)


@runs_here
def test_row_result_is_bitwise_independent_of_other_rows():
    (x, _, _, w), _ = make_bfloat16_problem(6, n=300, d=64, f=100, e=3, k=1)
    all_outputs = run_sorted_experts("cpp", x, [100, 0, 200], w)
    assert torch.equal(all_outputs[:7], run_sorted_experts("cpp", x[:7], [7, 0, 0], w))
    with torch.no_grad():
        x[150] = torch.nan
    nan_outputs = run_sorted_experts("cpp", x, [100, 0, 200], w)
    assert nan_outputs[150].isnan().all()
    other_rows = torch.arange(300) != 150
    assert torch.equal(nan_outputs[other_rows], all_outputs[other_rows])


@runs_here
def test_results_are_bitwise_reproducible():
    inputs, _ = make_bfloat16_problem(7, n=800, d=64, f=500, e=3, k=2)
    for a, b in zip(outputs_and_gradients("cpp", *inputs), outputs_and_gradients("cpp", *inputs), strict=True):
        assert torch.equal(a, b)


@runs_here
@pytest.mark.parametrize("size", [30, 1e3, 1e10])
def test_extreme_gate_projections_match_reference(size):
    """Outputs and gradients are right where silu(g) is g or 0, though e^-g may overflow float32."""
    (x, _, _, w), (exact_x, _, _, exact_weights) = make_bfloat16_problem(8, n=64, d=32, f=64, e=1, k=1)
    with torch.no_grad():
        x *= size
        exact_x *= size
        exact_x.copy_(x)
    results = with_gradients(run_sorted_experts("cpp", x, [64], w), [x, *w.stacked])
    expected = with_gradients(
        run_sorted_experts("reference", exact_x, [64], exact_weights), [exact_x, *exact_weights.stacked]
    )
    for a, b in zip(results, expected, strict=True):
        assert relative_error(a, b) < 1.2e-2


@runs_here
def test_runs_in_inference_mode():
    (x, expert, gate, w), _ = make_bfloat16_problem(9, n=5, d=8, f=8, e=2, k=2)
    with torch.inference_mode():
        assert run_experts("cpp", x, expert, gate, w).shape == x.shape


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"dtype": torch.float32}, TypeError, "bfloat16 only"),
        ({"d": 7}, ValueError, "even sizes only: rows are 7 wide, experts 8"),
        ({"f": 9}, ValueError, "even sizes only: rows are 6 wide, experts 9"),
        ({"function": GeluSubln()}, ValueError, "SwiGLU experts only"),
    ],
)
def test_unsupported_problem_is_refused_on_any_machine(change, error_type, message):
    sizes = {"n": 4, "d": 6, "f": 8, "e": 2, "k": 1, "dtype": torch.bfloat16} | change
    with pytest.raises(error_type, match=message):
        run_experts("cpp", *make_problem(0, **sizes))


@runs_here
def test_auto_chooses_cpp_on_amx_for_supported_experts(monkeypatch):
    (x, _, _, w), (exact_x, _, _, exact_weights) = make_bfloat16_problem(0, n=4, d=6, f=8, e=2, k=1)
    monkeypatch.setattr(cpp, "cpu_level", lambda: CpuLevel.AMX)
    assert choose_kernel("auto", x, w) == "cpp"
    assert choose_kernel("auto", exact_x, exact_weights) == "grouped"
    monkeypatch.setattr(cpp, "cpu_level", lambda: CpuLevel.AVX512_BF16)
    assert choose_kernel("auto", x, w) == "grouped"
    assert choose_kernel("cpp", x, w) == "cpp"


NO_BFLOAT16 = "this CPU cannot multiply bfloat16 (AVX512_BF16 or AMX)"
PRINT_REASON = "import torch; from mhmoe_kernels import cpp; print(cpp.unavailable_reason(torch.device('cpu')))"


def start_process(cache, **environment):
    """Start a process that compiles the kernel into the folder `cache`, and prints its unavailable reason or None."""
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.Popen([sys.executable, "-c", PRINT_REASON], env=variables, stdout=subprocess.PIPE, text=True)


def printed_reason(process):
    """Wait for the process to end, and return the reason that it prints."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return output.strip()


@runs_here
def test_concurrent_builds_leave_one_library(tmp_path):
    """A later process loads that library and does not compile again."""
    assert [printed_reason(p) for p in [start_process(tmp_path), start_process(tmp_path)]] == ["None", "None"]
    [library] = (tmp_path / "mhmoe").iterdir()
    file_status = library.stat()
    assert printed_reason(start_process(tmp_path)) == "None"
    assert library.stat() == file_status


@runs_here
def test_compiler_failure_is_reported_in_one_line(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    reason = printed_reason(start_process(tmp_path, CXX=str(compiler)))
    assert reason == f"{compiler} fails: x.cpp:1: error: no such thing"
    assert list((tmp_path / "mhmoe").iterdir()) == []


@runs_here
def test_unloadable_library_makes_kernel_unavailable(tmp_path):
    """A library may fail to load because its folder is mounted noexec or because it was built for another C library."""
    assert printed_reason(start_process(tmp_path)) == "None"
    [library] = (tmp_path / "mhmoe").iterdir()
    library.unlink()
    library.write_text("no library")
    assert (
        printed_reason(start_process(tmp_path)) == f"the compiled library cannot be loaded: {library}: file too short"
    )


@runs_here
def test_library_that_cannot_be_stored_makes_kernel_unavailable(tmp_path):
    # This compiler also creates a folder with the name of the library, so that the library cannot be moved to that
    # path.
    compiler = tmp_path / "c++"
    make_folder = '[ "$1" = -shared ] && mkdir -p "$(dirname "$(dirname "$4")")/$(basename "$4")/x"'
    compiler.write_text(f'#!/bin/sh\n{make_folder}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    assert printed_reason(start_process(tmp_path, CXX=str(compiler))).startswith(
        "the compiled library cannot be stored: "
    )


@runs_here
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "", "PATH": "/nowhere"}, "there is no g++: install one, or name a compiler in CXX"),
        ({"CXX": "/nowhere/g++"}, "/nowhere/g++ cannot be run: No such file or directory"),
    ],
)
def test_missing_compiler_makes_kernel_unavailable(tmp_path, environment, reason):
    assert printed_reason(start_process(tmp_path, **environment)) == reason


@pytest.mark.parametrize("level", [level for level in CpuLevel if level < CpuLevel.AVX512_BF16])
def test_lower_cpu_level_makes_kernel_unavailable_and_auto_chooses_grouped(tmp_path, level):
    if sys.platform == "linux":
        assert printed_reason(start_process(tmp_path, **level_environment(level))) == NO_BFLOAT16
    code = (
        "import torch; from mhmoe_kernels import choose_kernel; from tests.kernels.problems import make_problem;"
        "x, *_, weights = make_problem(0, n=4, d=6, f=8, e=2, k=1, dtype=torch.bfloat16);"
        "print(choose_kernel('auto', x, weights))"
    )
    environment = {**os.environ, **level_environment(level)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "grouped"


def test_unknown_cpu_level_makes_kernel_unavailable(tmp_path):
    if sys.platform == "linux":
        assert printed_reason(start_process(tmp_path, MHMOE_CPU_LEVEL="sse9")).startswith(
            "MHMOE_CPU_LEVEL is 'sse9', but levels are "
        )


def test_kernel_is_unavailable_on_other_devices():
    assert cpp.unavailable_reason(torch.device("meta")) == "kernel cpp is for CPUs, and this is meta"
