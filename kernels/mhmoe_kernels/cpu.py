"""The level of the CPU, which says what instructions it has, as one of a few ordered levels (`cpu_level`).

torch and oneDNN each choose their code by the CPU. `level_environment` restricts them and this package to one level, so
that a machine can show what happens on lesser CPUs.
"""

import os
from enum import IntEnum
from functools import cache

import torch

VARIABLE = "MHMOE_CPU_LEVEL"
"""Environment variable with the highest level that the CPU is taken to have, in lower case."""


class CpuLevel(IntEnum):
    """Level of a CPU; each level has the instructions of those before it."""

    GENERIC = 0
    """Any x86 CPU without AVX2, and every other CPU."""
    AVX2 = 1
    """AVX2 with FMA."""
    AVX512 = 2
    """AVX512F, BW, DQ and VL, which torch and oneDNN require together."""
    AVX512_BF16 = 3
    """Multiplication of bfloat16 vectors."""
    AMX = 4
    """Multiplication of bfloat16 tiles, which the system allows this process to use."""


TITLES = {
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
"""Values of ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS for each level. MKL follows its
variable only on Intel's CPUs."""


def is_x86() -> bool:
    """Return whether the CPU is an x86, for which the levels are defined."""
    return str(torch.cpu.get_capabilities()["architecture"]) in ("x86", "x86_64")


@cache
def machine_level() -> CpuLevel:
    """Return the level of the CPU itself, regardless of the environment.

    torch's own answer (`torch.backends.cpu.get_cpu_capability`) follows ATEN_CPU_CAPABILITY even to instructions that
    the CPU lacks, so this reads the CPU's instruction flags. AMX is requested from the system, because a CPU may list
    it where the system, a sandbox or a hypervisor does not let processes use its tiles. A process that has requested it
    once may use it.
    """
    has = torch.cpu.get_capabilities()

    def has_all(*names: str) -> bool:
        return all(has.get(name, False) for name in names)

    if not has_all("avx2", "fma3"):
        return CpuLevel.GENERIC
    if not has_all("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"):
        return CpuLevel.AVX2
    if not has_all("avx512_bf16"):
        return CpuLevel.AVX512
    amx = has_all("amx_tile", "amx_bf16") and torch.cpu._init_amx()
    return CpuLevel.AMX if amx else CpuLevel.AVX512_BF16


def asked_level() -> CpuLevel | None:
    """Return the level that MHMOE_CPU_LEVEL names; None if it is unset or empty.

    Raises:
        ValueError: MHMOE_CPU_LEVEL names no level.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    names = [level.name.lower() for level in CpuLevel]
    if text not in names:
        raise ValueError(f"{VARIABLE} is {text!r}, but levels are {', '.join(names)}: set it to one, or not at all")
    return CpuLevel(names.index(text))


def cpu_level() -> CpuLevel:
    """Return the level that this process may use.

    This is the level of the CPU itself, lowered to MHMOE_CPU_LEVEL and to what torch takes the CPU for, which
    ATEN_CPU_CAPABILITY controls. Neither can raise it.

    Raises:
        ValueError: MHMOE_CPU_LEVEL names no level.
    """
    wanted_level = asked_level()
    bounds = {"DEFAULT": CpuLevel.GENERIC, "NO AVX": CpuLevel.GENERIC, "AVX2": CpuLevel.AVX2}
    torch_level = bounds.get(torch.backends.cpu.get_cpu_capability(), CpuLevel.AMX)
    return min(machine_level(), torch_level, CpuLevel.AMX if wanted_level is None else wanted_level)


def level_environment(level: CpuLevel) -> dict[str, str]:
    """Return the environment variables that restrict this package, torch, oneDNN and MKL to a level, in a process and
    its children.

    Each of them reads its variable when it first computes, so the variables must be set before. On a CPU that is no
    x86, only this package's own variable is returned.

    Args:
        level: the level; one above the machine's own is lowered to that, because torch would believe it and crash.
    """
    level = min(level, machine_level())
    own_variable = {VARIABLE: level.name.lower()}
    if not is_x86():
        return own_variable
    aten, onednn, mkl = _ENVIRONMENTS[level]
    return {**own_variable, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
