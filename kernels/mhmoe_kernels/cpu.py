"""The level of the CPU: which instructions it computes with, as one of a few ordered levels (`cpu_level`).

torch and oneDNN choose their code by the CPU, each for itself. `level_environment` holds them and us to one level, so
that a machine can show what happens on lesser ones.
"""

import os
from enum import IntEnum
from functools import cache

import torch

VARIABLE = "MHMOE_CPU_LEVEL"
"""Names the level that the CPU is taken to have at most, in lower case."""


class CpuLevel(IntEnum):
    """Each level has the instructions of those before it."""

    GENERIC = 0
    """Anything less than AVX2, and every CPU that is no x86."""
    AVX2 = 1
    """With FMA."""
    AVX512 = 2
    """AVX512F, BW, DQ and VL, as torch and oneDNN want them together."""
    AVX512_BF16 = 3
    """Multiplies bfloat16."""
    AMX = 4
    """Multiplies tiles of bfloat16, and the system lets this process do so."""


TITLES = {
    CpuLevel.GENERIC: "no AVX2",
    CpuLevel.AVX2: "AVX2",
    CpuLevel.AVX512: "AVX512",
    CpuLevel.AVX512_BF16: "AVX512, BF16",
    CpuLevel.AMX: "AVX512, BF16, AMX",
}
"""Levels as people read them."""

_ENVIRONMENTS = {
    CpuLevel.GENERIC: ("default", "SSE41", "SSE4_2"),
    CpuLevel.AVX2: ("avx2", "AVX2", "AVX2"),
    CpuLevel.AVX512: ("avx512", "AVX512_CORE", "AVX512"),
    CpuLevel.AVX512_BF16: ("avx512", "AVX512_CORE_BF16", "AVX512_E3"),
    CpuLevel.AMX: ("avx512", "DEFAULT", "AVX512_E4"),
}
"""ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS, which MKL follows on Intel's CPUs alone."""


def is_x86() -> bool:
    """Return whether the CPU has levels at all."""
    return str(torch.cpu.get_capabilities()["architecture"]) in ("x86", "x86_64")


@cache
def machine_level() -> CpuLevel:
    """Return the level of the CPU itself, whatever the environment says.

    torch's own word (`torch.backends.cpu.get_cpu_capability`) follows ATEN_CPU_CAPABILITY even to instructions that
    the CPU lacks, so the instructions are looked at. AMX is asked for, since a CPU may name it where the system, a
    sandbox or a hypervisor does not let processes use its tiles; a process that has asked once may use them.
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
    """Return the level that MHMOE_CPU_LEVEL names; None where it is not set, or empty.

    Raises:
        ValueError: it names none.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    names = [level.name.lower() for level in CpuLevel]
    if text not in names:
        raise ValueError(f"{VARIABLE} is {text!r}, but levels are {', '.join(names)}: set it to one, or not at all")
    return CpuLevel(names.index(text))


def cpu_level() -> CpuLevel:
    """Return what this process may take the CPU to compute.

    That is the level of the CPU itself, lowered to MHMOE_CPU_LEVEL and to what torch takes the CPU for, which
    ATEN_CPU_CAPABILITY tells it; neither raises it.

    Raises:
        ValueError: MHMOE_CPU_LEVEL names no level.
    """
    wanted_level = asked_level()
    bounds = {"DEFAULT": CpuLevel.GENERIC, "NO AVX": CpuLevel.GENERIC, "AVX2": CpuLevel.AVX2}
    torch_level = bounds.get(torch.backends.cpu.get_cpu_capability(), CpuLevel.AMX)
    return min(machine_level(), torch_level, CpuLevel.AMX if wanted_level is None else wanted_level)


def level_environment(level: CpuLevel) -> dict[str, str]:
    """Return the variables that hold a process and its children to a level: us, torch, oneDNN and MKL.

    They are read when each of them first computes, so they must be there before. On a CPU that is no x86 they are
    ours alone.

    Args:
        level: one above the machine's own is taken for that, since torch would believe it and crash.
    """
    level = min(level, machine_level())
    own_variable = {VARIABLE: level.name.lower()}
    if not is_x86():
        return own_variable
    aten, onednn, mkl = _ENVIRONMENTS[level]
    return {**own_variable, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
