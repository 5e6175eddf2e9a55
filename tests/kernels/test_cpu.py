"""Tests of the CPU level of simulated machines, of this machine, and of processes restricted to a lower level."""

import os
import re
import subprocess
import sys
from types import MappingProxyType

import pytest
import torch

from mhmoe_kernels import cpu
from mhmoe_kernels.cpu import LEVEL_VARIABLE, CpuLevel, cpu_level, level_environment, machine_level, requested_level

AVX2 = ("avx2", "fma3")
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
AMX = (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16")
pytestmark = pytest.mark.cpu


@pytest.fixture
def machine(monkeypatch):
    """Yield a function that simulates a machine with the given instructions, with or without usable AMX.

    The environment variable that lowers the CPU level is not set.
    """

    def set_machine(*instructions, amx=True, architecture="x86_64", capability="AVX512"):
        capabilities = {"architecture": architecture, **dict.fromkeys(instructions, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(capabilities))
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: amx)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
        machine_level.cache_clear()

    yield set_machine
    machine_level.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "amx", "level"),
    [
        ((), True, CpuLevel.GENERIC),
        (("avx2",), True, CpuLevel.GENERIC),  # for AVX2, torch requires FMA too
        (AVX2, True, CpuLevel.AVX2),
        ((*AVX2, "avx512_f"), True, CpuLevel.AVX2),  # Xeon Phi lacks AVX-512 BW, DQ and VL.
        (AVX512, True, CpuLevel.AVX512),
        ((*AVX512, "amx_tile", "amx_bf16"), True, CpuLevel.AVX512),
        ((*AVX512, "avx512_bf16"), True, CpuLevel.AVX512_BF16),
        (AMX, False, CpuLevel.AVX512_BF16),  # the CPU has AMX, but the system forbids it
        (AMX, True, CpuLevel.AMX),
    ],
)
def test_machine_level_requires_all_lower_instructions(machine, instructions, amx, level):
    machine(*instructions, amx=amx)
    assert machine_level() == cpu_level() == level


def test_other_architecture_is_generic_without_library_variables(machine):
    machine("neon", "sve", architecture="arm64", capability="SVE256")
    assert cpu_level() == CpuLevel.GENERIC
    assert level_environment(CpuLevel.AMX) == {LEVEL_VARIABLE: "generic"}


@pytest.mark.parametrize("named_level", CpuLevel)
def test_variable_only_lowers_cpu_level(machine, monkeypatch, named_level):
    machine(*AVX512)
    monkeypatch.setenv(LEVEL_VARIABLE, named_level.name.lower())
    assert cpu_level() == min(named_level, CpuLevel.AVX512)


@pytest.mark.parametrize(
    ("capability", "level"), [("DEFAULT", CpuLevel.GENERIC), ("AVX2", CpuLevel.AVX2), ("AVX512", CpuLevel.AMX)]
)
def test_torch_capability_lowers_cpu_level(machine, capability, level):
    machine(*AMX, capability=capability)
    assert cpu_level() == level


@pytest.mark.parametrize("text", ["avx", "AVX2", "4", " avx2"])
def test_unknown_level_is_refused(monkeypatch, text):
    monkeypatch.setenv(LEVEL_VARIABLE, text)
    with pytest.raises(ValueError, match=r"levels are generic, avx2, avx512, avx512_bf16, amx: set it to one"):
        cpu_level()


def test_empty_variable_requests_no_level(monkeypatch):
    monkeypatch.setenv(LEVEL_VARIABLE, "")
    assert requested_level() is None


def test_level_environment_is_limited_to_machine_level(machine):
    machine(*AVX2)
    assert level_environment(CpuLevel.AMX) == level_environment(CpuLevel.AVX2)
    assert level_environment(CpuLevel.AVX2)["ATEN_CPU_CAPABILITY"] == "avx2"
    assert level_environment(CpuLevel.GENERIC)["ONEDNN_MAX_CPU_ISA"] == "SSE41"


PRINT_LEVEL = """
import torch
from mhmoe_kernels.cpu import cpu_level
print(cpu_level().name, torch.backends.cpu.get_cpu_capability(), flush=True)
torch.nn.functional.linear(torch.ones(4, 8), torch.ones(8, 8).to_mkldnn().to_dense())
"""
ONEDNN_NAMES = {
    CpuLevel.GENERIC: "Intel SSE4.1",
    CpuLevel.AVX2: "Intel AVX2",
    CpuLevel.AMX: r"Intel (AVX-512|AVX10)\S* .*Intel AMX",
}
"""Patterns of the names of these levels in oneDNN; the names of the other levels begin with AVX-512."""


@pytest.mark.parametrize("level", [level for level in CpuLevel if level <= machine_level()])
def test_level_environment_restricts_all_libraries(level):
    """Our code, torch and oneDNN all use the level, also if this test session is restricted to another level."""
    environment = {**os.environ, **level_environment(level), "ONEDNN_VERBOSE": "all"}
    process = subprocess.run(
        [sys.executable, "-c", PRINT_LEVEL], env=environment, capture_output=True, text=True, check=True
    )
    assert cpu.is_x86() or level == CpuLevel.GENERIC
    if cpu.is_x86():
        torch_level = {CpuLevel.GENERIC: "DEFAULT", CpuLevel.AVX2: "AVX2"}.get(level, "AVX512")
        assert f"{level.name} {torch_level}" in process.stdout
        [isa] = [line for line in process.stdout.splitlines() if "info,cpu,isa:" in line]
        assert re.search(ONEDNN_NAMES.get(level, "Intel AVX-512"), isa)


def test_process_runs_at_requested_level():
    requested = requested_level()
    assert cpu_level() <= machine_level()
    assert requested is None or cpu_level() == min(requested, machine_level())
