"""Instruction level of the CPU, such as AVX2 or AMX.

torch and oneDNN choose their code by it. `level_environment` restricts them and this package to a level, so that tests
on one machine cover other CPUs.
"""

import os
from enum import IntEnum
from functools import cache

import torch

LEVEL_VARIABLE = "MHMOE_CPU_LEVEL"
"""Environment variable that limits the instruction level to a name in lower case."""


class CpuLevel(IntEnum):
    """Instruction level of a CPU; each level includes the levels below it."""

    GENERIC = 0
    """x86 CPU without AVX2, or a CPU of another architecture."""
    AVX2 = 1
    """AVX2 with FMA."""
    AVX512 = 2
    """AVX512F, BW, DQ and VL, which torch and oneDNN require together."""
    AVX512_BF16 = 3
    """Multiplication of bfloat16 vectors."""
    AMX = 4
    """Multiplication of bfloat16 tiles; the system allows this process to use them."""


LEVEL_TITLES = {
    CpuLevel.GENERIC: "no AVX2",
    CpuLevel.AVX2: "AVX2",
    CpuLevel.AVX512: "AVX512",
    CpuLevel.AVX512_BF16: "AVX512, BF16",
    CpuLevel.AMX: "AVX512, BF16, AMX",
}
"""Names of the levels for display."""

_ENVIRONMENTS = {
    CpuLevel.GENERIC: ("default", "SSE41", "SSE4_2"),
    CpuLevel.AVX2: ("avx2", "AVX2", "AVX2"),
    CpuLevel.AVX512: ("avx512", "AVX512_CORE", "AVX512"),
    CpuLevel.AVX512_BF16: ("avx512", "AVX512_CORE_BF16", "AVX512_E3"),
    CpuLevel.AMX: ("avx512", "DEFAULT", "AVX512_E4"),
}
"""ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS, which MKL obeys on Intel's CPUs only."""


def is_x86() -> bool:
    """Return whether the CPU is an x86, for which levels above GENERIC exist."""
    return str(torch.cpu.get_capabilities()["architecture"]) in ("x86", "x86_64")


@cache
def machine_level() -> CpuLevel:
    """Return the CPU's own level, and request AMX from the system, which the process may use afterwards."""
    # `torch.backends.cpu.get_cpu_capability` obeys ATEN_CPU_CAPABILITY, even for instructions that the CPU lacks. The
    # instruction flags below do not depend on that variable.
    capabilities = torch.cpu.get_capabilities()

    def has_features(*names: str) -> bool:
        return all(capabilities.get(name, False) for name in names)

    if not has_features("avx2", "fma3"):
        return CpuLevel.GENERIC
    if not has_features("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"):
        return CpuLevel.AVX2
    if not has_features("avx512_bf16"):
        return CpuLevel.AVX512
    # A CPU may list AMX although the system, a sandbox or a hypervisor forbids its tiles, so only a request shows
    # whether AMX can be used.
    has_amx = has_features("amx_tile", "amx_bf16") and torch.cpu._init_amx()
    return CpuLevel.AMX if has_amx else CpuLevel.AVX512_BF16


def requested_level() -> CpuLevel | None:
    """Return the level that MHMOE_CPU_LEVEL names, if it is set; ValueError for an unknown name."""
    text = os.environ.get(LEVEL_VARIABLE, "")
    if not text:
        return None
    names = [level.name.lower() for level in CpuLevel]
    if text not in names:
        raise ValueError(
            f"{LEVEL_VARIABLE} is {text!r}, but levels are {', '.join(names)}: set it to one, or not at all"
        )
    return CpuLevel(names.index(text))


def cpu_level() -> CpuLevel:
    """Return the level that this process may use: the lowest of the CPU's, MHMOE_CPU_LEVEL and ATEN_CPU_CAPABILITY.

    An unknown MHMOE_CPU_LEVEL is a ValueError.
    """
    level_limit = requested_level()
    # AVX512 is the highest capability that torch reports. So a capability that is not in this table sets no limit.
    torch_levels = {"DEFAULT": CpuLevel.GENERIC, "NO AVX": CpuLevel.GENERIC, "AVX2": CpuLevel.AVX2}
    torch_level = torch_levels.get(torch.backends.cpu.get_cpu_capability(), CpuLevel.AMX)
    return min(machine_level(), torch_level, CpuLevel.AMX if level_limit is None else level_limit)


def level_environment(level: CpuLevel) -> dict[str, str]:
    """Return the environment variables that restrict this package, torch, oneDNN and MKL to at most `level`.

    Each library reads its variable at the first computation. On other architectures than x86, only this package's own
    variable is returned.
    """
    # torch would believe a higher level and crash at the first instruction that the CPU lacks.
    level = min(level, machine_level())
    level_variable = {LEVEL_VARIABLE: level.name.lower()}
    if not is_x86():
        return level_variable
    aten, onednn, mkl = _ENVIRONMENTS[level]
    return {**level_variable, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
