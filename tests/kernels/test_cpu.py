"""The level of a CPU: of made-up machines, of this one, and of processes that are held to a lower level."""

import os
import subprocess
import sys
from types import MappingProxyType

import pytest
import torch

from mhmoe_kernels import cpu
from mhmoe_kernels.cpu import VARIABLE, CpuLevel, asked_level, cpu_level, level_environment, machine_level

AVX2 = ("avx2", "fma3")
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
AMX = (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16")
pytestmark = pytest.mark.cpu


@pytest.fixture
def machine(monkeypatch):
    """Yield a function that makes this a machine of given instructions, with or without usable AMX.

    Nothing lowers the level of that machine.
    """

    def become(*instructions, amx=True, architecture="x86_64", capability="AVX512"):
        has = {"architecture": architecture, **dict.fromkeys(instructions, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(has))
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: amx)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.delenv(VARIABLE, raising=False)
        machine_level.cache_clear()

    yield become
    machine_level.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "amx", "level"),
    [
        ((), True, CpuLevel.GENERIC),
        (("avx2",), True, CpuLevel.GENERIC),  # torch wants FMA beside it
        (AVX2, True, CpuLevel.AVX2),
        ((*AVX2, "avx512_f"), True, CpuLevel.AVX2),  # as on Xeon Phi
        (AVX512, True, CpuLevel.AVX512),
        ((*AVX512, "amx_tile", "amx_bf16"), True, CpuLevel.AVX512),
        ((*AVX512, "avx512_bf16"), True, CpuLevel.AVX512_BF16),
        (AMX, False, CpuLevel.AVX512_BF16),  # it is there, and may not be used
        (AMX, True, CpuLevel.AMX),
    ],
)
def test_a_level_has_all_instructions_of_those_before_it(machine, instructions, amx, level):
    machine(*instructions, amx=amx)
    assert machine_level() == cpu_level() == level


def test_what_is_no_x86_is_generic_and_its_libraries_are_told_nothing(machine):
    machine("neon", "sve", architecture="arm64", capability="SVE256")
    assert cpu_level() == CpuLevel.GENERIC
    assert level_environment(CpuLevel.AMX) == {VARIABLE: "generic"}


@pytest.mark.parametrize("named", CpuLevel)
def test_the_variable_lowers_and_never_raises(machine, monkeypatch, named):
    machine(*AVX512)
    monkeypatch.setenv(VARIABLE, named.name.lower())
    assert cpu_level() == min(named, CpuLevel.AVX512)


@pytest.mark.parametrize(
    ("capability", "level"), [("DEFAULT", CpuLevel.GENERIC), ("AVX2", CpuLevel.AVX2), ("AVX512", CpuLevel.AMX)]
)
def test_what_torch_is_held_to_lowers_too(machine, capability, level):
    machine(*AMX, capability=capability)
    assert cpu_level() == level


@pytest.mark.parametrize("text", ["avx", "AVX2", "4", " avx2"])
def test_a_level_that_there_is_not_is_refused(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=r"levels are generic, avx2, avx512, avx512_bf16, amx: set it to one"):
        cpu_level()


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    assert asked_level() is None


def test_an_environment_names_no_more_than_the_machine_has(machine):
    machine(*AVX2)
    assert level_environment(CpuLevel.AMX) == level_environment(CpuLevel.AVX2)
    assert level_environment(CpuLevel.AVX2)["ATEN_CPU_CAPABILITY"] == "avx2"
    assert level_environment(CpuLevel.GENERIC)["ONEDNN_MAX_CPU_ISA"] == "SSE41"


SAY = """
import torch
from mhmoe_kernels.cpu import cpu_level
print(cpu_level().name, torch.backends.cpu.get_cpu_capability(), flush=True)
torch.nn.functional.linear(torch.ones(4, 8), torch.ones(8, 8).to_mkldnn().to_dense())
"""
ONEDNN = {CpuLevel.GENERIC: "Intel SSE4.1", CpuLevel.AVX2: "Intel AVX2"}
"""Names that oneDNN has for these levels; the names of the other levels begin with AVX-512."""


@pytest.mark.parametrize("level", [level for level in CpuLevel if level <= machine_level()])
def test_a_process_with_the_environment_of_a_level_is_at_it(level):
    """Our code, torch and oneDNN are all at the level, whatever level the processes of this session are held to."""
    environment = {**os.environ, **level_environment(level), "ONEDNN_VERBOSE": "all"}
    done = subprocess.run([sys.executable, "-c", SAY], env=environment, capture_output=True, text=True, check=True)
    assert cpu.is_x86() or level == CpuLevel.GENERIC
    if cpu.is_x86():
        torchs = {CpuLevel.GENERIC: "DEFAULT", CpuLevel.AVX2: "AVX2"}.get(level, "AVX512")
        assert f"{level.name} {torchs}" in done.stdout
        [isa] = [line for line in done.stdout.splitlines() if "info,cpu,isa:" in line]
        assert ONEDNN.get(level, "Intel AVX-512") in isa


def test_this_process_is_at_the_level_that_the_session_was_asked_for():
    asked = asked_level()
    assert cpu_level() <= machine_level()
    assert asked is None or cpu_level() == min(asked, machine_level())
