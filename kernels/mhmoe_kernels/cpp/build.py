"""Compilation of this folder's kernels for the CPU of this machine, once: the result is kept in the user's cache."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from mhmoe_kernels.cpu import CpuLevel, cpu_level

SOURCES = ("swiglu.cpp", "transpose.h")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-Wall", "-Werror")


class BuildError(Exception):
    """Error that says in one line why the kernels cannot be built or loaded."""


def library() -> ctypes.CDLL:
    """Return the compiled kernels, which the first call builds.

    Raises:
        BuildError: this machine lacks something, or its compiler fails.
    """
    found = _once()
    if isinstance(found, BuildError):
        raise found
    return found


@cache
def _once() -> ctypes.CDLL | BuildError:
    """Return the library, or the error if it cannot be built; an error is cached too, because no layer should try
    again."""
    try:
        path = _built()
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:  # a folder without leave to execute, another machine's C library
            raise BuildError(f"what was compiled cannot be loaded: {error}") from error
    except BuildError as error:
        return error


def _built() -> Path:
    if sys.platform != "linux":
        raise BuildError("it is built on Linux only")
    try:
        level = cpu_level()
    except ValueError as error:
        raise BuildError(str(error)) from error
    if level < CpuLevel.AVX512_BF16:
        raise BuildError("this CPU multiplies no bfloat16 (AVX512_BF16, or AMX)")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("there is no g++: install one, or name a compiler in CXX")
    path = _cache() / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists():
        _build(compiler, path)
    return path


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhmoe"
    except RuntimeError as error:
        raise BuildError(f"no place to keep what is compiled: {error}") from error


def _fingerprint(compiler: str) -> str:
    """Return a hash of everything that the result depends on, because machines of different kinds may share a home
    directory."""
    here = Path(__file__).parent
    cpu = re.search(r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    parts = [*((here / name).read_bytes() for name in SOURCES), *(text.encode() for text in FLAGS)]
    parts += [version("torch").encode(), str(_openmp()).encode(), _run([compiler, "--version"]).encode()]
    parts += [cpu.group().encode() if cpu else b""]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _build(compiler: str, path: Path) -> None:
    """Compile beside `path` and move the result there, so that processes that build at the same time do not
    interfere."""
    here, torch_folder = Path(__file__).parent, Path(torch.__file__).parent
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent))
    except OSError as error:
        raise BuildError(f"no place to keep what is compiled: {error}") from error
    try:
        compiled, linked = folder / "kernels.o", folder / path.name
        _run(
            [compiler, *FLAGS, f"-isystem{torch_folder / 'include'}", "-c", str(here / SOURCES[0]), "-o", str(compiled)]
        )
        # Torch's own OpenMP, whose threads are there already; -fopenmp here would bring a second set of them.
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", str(_openmp())]
        _run([compiler, "-shared", str(compiled), "-o", str(linked), *libraries])
        linked.replace(path)
    except OSError as error:
        raise BuildError(f"what was compiled cannot be kept: {error}") from error
    finally:
        shutil.rmtree(folder)


def _openmp() -> Path:
    """Return the path of the OpenMP library that this process has loaded by importing torch.

    Raises:
        BuildError: torch does not use GNU's OpenMP.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libgomp"):
            return path
    raise BuildError("this build of torch does not run its threads by GNU's OpenMP")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{command[0]} fails: {lines[0]}")
    return done.stdout
