"""Tests of the compiled kernels' resources. A GPU is not needed, but the compiler that Triton brings along is."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_kernels.triton.fused import blocks

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.long,
]


OLDEST_TRITON = "3.6.0"
"""Oldest version of Triton that pyproject.toml allows; torch 2.11 brings this version along."""


def compile_in_process(tmp_path, code, *packages):
    """Run code in a process in which Triton compiles instead of interpreting, and return what it prints.

    Packages in the folders `packages` replace installed ones.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    if packages:
        environment["PYTHONPATH"] = os.pathsep.join([*map(str, packages), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow  # test_experts.py runs the kernels in the interpreter
def test_grouped_products_compile_for_an_h100(tmp_path):
    """Kernels of grouped products use tensor cores, have no traps, fit into shared memory and spill few registers."""
    printed = compile_in_process(
        tmp_path,
        "import torch\n"
        "from mhmoe_kernels.triton.resources import *\n"
        "builds = [b for b in grouped_builds(90, torch.bfloat16) if b.name.startswith(('linear 128', 'outer'))]\n"
        "builds += [b for b in small_builds() if b.name.startswith('route: logits')]\n"
        "for build in builds:\n"
        "    compiled = compile_build(build, 90, torch.bfloat16)\n"
        "    result = usage(compiled)\n"
        "    assert refusal(compiled, SHARED_LIMITS[90]) is None, (build.name, result)\n"
        "    assert result.matrix_instructions and result.spilled_bytes <= MAX_SPILLED_BYTES, (build.name, result)\n"
        "print(len(builds))\n",
    )
    assert printed == "14\n"


def compile_all(capability):
    """Return code that compiles all kernels for a compute capability, such as 90, and prints the version of Triton."""
    return (
        "import torch\n"
        "import triton\n"
        "from mhmoe_kernels.choice import GPU_CHOICES\n"
        "from mhmoe_kernels.triton.resources import *\n"
        f"capability = {capability}\n"
        "[fused] = [choice for choice in GPU_CHOICES if choice.kernel == 'triton']\n"
        "widths = (96, 128, 192, 256) if capability // 10 in fused.majors else ()\n"
        "chosen = [b for w in widths for kind in ('swiglu', 'gelu') for b in fused_builds(kind, w, torch.bfloat16)]\n"
        "failures = []\n"
        "for build in (*grouped_builds(capability, torch.bfloat16), *small_builds(), *chosen):\n"
        "    compiled = compile_build(build, capability, torch.bfloat16)\n"
        "    result = usage(compiled)\n"
        "    # Only inference takes fused experts, so only their forward kernels matter.\n"
        "    may_spill = build.name.endswith(('backward_rows', 'backward_weights'))\n"
        "    spills = result.spilled_bytes > MAX_SPILLED_BYTES and not may_spill\n"
        "    if spills or refusal(compiled, SHARED_LIMITS[capability]):\n"
        "        failures.append((build.name, result))\n"
        "assert not failures, failures\n"
        "for build in (*grouped_builds(capability, torch.float32), *small_builds()):\n"
        "    compiled = compile_build(build, capability, torch.float32)\n"
        "    assert refusal(compiled, SHARED_LIMITS[capability]) is None, build.name\n"
        "print(triton.__version__)\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_all_kernels_compile_for_every_generation(tmp_path, capability):
    """Compiled kernels have no trap, fit into shared memory, and spill little at the sizes that `auto` chooses."""
    assert compile_in_process(tmp_path, compile_all(capability)).count(".") == 2


@pytest.fixture(scope="module")
def oldest_triton(tmp_path_factory):
    """Download the oldest version of Triton that is supported, and return its folder."""
    folder = tmp_path_factory.mktemp("triton")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        folder,
        f"triton=={OLDEST_TRITON}",
    ]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.system
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_all_kernels_compile_with_the_oldest_triton(tmp_path, oldest_triton, capability):
    printed = compile_in_process(tmp_path, compile_all(capability), oldest_triton)
    assert printed == f"{OLDEST_TRITON}\n"


@pytest.mark.slow
def test_fused_experts_that_cannot_run_on_a_gpu_are_refused(tmp_path):
    """Some kernels need more shared memory than Blackwell has; older versions of Triton compile others to a trap."""
    printed = compile_in_process(
        tmp_path,
        "import torch\n"
        "from mhmoe_kernels.triton.resources import *\n"
        "print(fused_refusal('swiglu', 256, torch.bfloat16, 100, SHARED_LIMITS[100]))\n"
        "print(fused_refusal('swiglu', 128, torch.bfloat16, 120, SHARED_LIMITS[120]))\n"
        "print(fused_refusal('swiglu', 128, torch.bfloat16, 90, SHARED_LIMITS[90]))\n",
    )
    blackwell, consumer, hopper = printed.splitlines()
    assert blackwell.startswith("swiglu backward_weights for rows of 256: it needs 2")
    assert "shared memory, and this GPU has 101376" in consumer
    assert hopper == "None"


def test_block_sizes_of_fused_kernels_fit_in_shared_memory():
    """The memory of each entry in fused/blocks.py for bfloat16 is computed by the formula there, for the widest rows of
    the entry."""
    for (kind, kernel), table in blocks._BFLOAT16.items():
        matrices = {"swiglu": 3, "gelu": 2}[kind]
        for width, (rows, hidden, _, stages) in table.items():
            shared_bytes = {
                "forward": 2 * rows * width + stages * matrices * 2 * hidden * width,
                "backward_rows": 2 * 2 * rows * width + stages * matrices * 2 * hidden * width,
                "backward_weights": stages * 2 * 2 * rows * width + matrices * 2 * hidden * width,
            }
            assert shared_bytes[kernel] <= 227 << 10, (kind, kernel, width)


def test_every_dtype_has_blocks():
    from mhmoe_kernels.triton.grouped.blocks import ROW_BLOCKS, linear_blocks, outer_blocks, rows_per_tile

    for dtype in (torch.float32, torch.bfloat16):
        for capability in (0, 80, 90, 100, 120):
            assert all(linear_blocks(rows, 856, dtype, capability).stages >= 2 for rows in ROW_BLOCKS)
            assert outer_blocks(856, 2048, dtype, capability)[0] >= 64
    assert [rows_per_tile(1024, 8), rows_per_tile(1024, 32), rows_per_tile(10, 64)] == [128, 64, 16]


@given(st.integers(1, 8192), st.sampled_from([128, 256]))
def test_columns_are_computed_with_little_padding(width, largest):
    """A block is the largest, except where a smaller one saves an eighth of the computed columns."""
    from mhmoe_kernels.triton.grouped.blocks import column_block

    def computed_columns(block):
        return -(-width // block) * block

    block = column_block(width, largest)
    assert block <= largest
    assert all(computed_columns(b) > 7 / 8 * computed_columns(block) for b in (128, 64) if b < block)
    assert block == largest or computed_columns(block) <= 7 / 8 * computed_columns(largest)
    assert [column_block(w, 256) for w in (856, 2048, 768, 384, 192)] == [128, 256, 256, 128, 64]
