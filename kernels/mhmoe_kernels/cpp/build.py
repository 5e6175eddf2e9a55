"""Compilation of this folder's C++ kernels for this machine's CPU, into the user's cache folder."""

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
    """Reason, in one line, why the kernels cannot be built or loaded."""


def library() -> ctypes.CDLL:
    """Return the compiled kernels, which the first call builds and loads; BuildError if this fails."""
    result = _library_or_error()
    if isinstance(result, BuildError):
        raise result
    return result


@cache
def _library_or_error() -> ctypes.CDLL | BuildError:
    # The error is returned, not raised, so that it is cached too: otherwise each layer would try the build again.
    try:
        path = _ensure_built()
        try:
            return ctypes.CDLL(str(path))
        # Loading fails if, for example, the folder forbids execution or the library needs another machine's C library.
        except OSError as error:
            raise BuildError(f"the compiled library cannot be loaded: {error}") from error
    except BuildError as error:
        return error


def _ensure_built() -> Path:
    if sys.platform != "linux":
        raise BuildError("the kernel is built on Linux only")
    try:
        level = cpu_level()
    except ValueError as error:
        raise BuildError(str(error)) from error
    if level < CpuLevel.AVX512_BF16:
        raise BuildError("this CPU cannot multiply bfloat16 (AVX512_BF16 or AMX)")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("there is no g++: install one, or name a compiler in CXX")
    path = _cache_folder() / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    return path


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhmoe"
    except RuntimeError as error:
        raise BuildError(f"there is no folder for the compiled library: {error}") from error


def _fingerprint(compiler: str) -> str:
    # The hash covers the machine, because machines with different CPUs, compilers or versions of torch may share a home
    # directory and its cache folder.
    source_folder = Path(__file__).parent
    cpu = re.search(r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    inputs = [*((source_folder / name).read_bytes() for name in SOURCES), *(text.encode() for text in FLAGS)]
    inputs += [version("torch").encode(), str(_openmp_path()).encode(), _run_command([compiler, "--version"]).encode()]
    inputs += [cpu.group().encode() if cpu else b""]
    return hashlib.sha256(b"\0".join(inputs)).hexdigest()[:24]


def _compile(compiler: str, path: Path) -> None:
    # The library is built in a folder of its own beside `path` and then moved, so that processes that build at the same
    # time do not interfere.
    source_folder, torch_folder = Path(__file__).parent, Path(torch.__file__).parent
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent))
    except OSError as error:
        raise BuildError(f"there is no folder for the compiled library: {error}") from error
    try:
        object_file, linked_file = folder / "kernels.o", folder / path.name
        _run_command(
            [
                compiler,
                *FLAGS,
                f"-isystem{torch_folder / 'include'}",
                "-c",
                str(source_folder / SOURCES[0]),
                "-o",
                str(object_file),
            ]
        )
        # The library must use torch's OpenMP and its threads. The flag -fopenmp would link another OpenMP library, with
        # threads of its own.
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", str(_openmp_path())]
        _run_command([compiler, "-shared", str(object_file), "-o", str(linked_file), *libraries])
        linked_file.replace(path)
    except OSError as error:
        raise BuildError(f"the compiled library cannot be stored: {error}") from error
    finally:
        shutil.rmtree(folder)


def _openmp_path() -> Path:
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libgomp"):
            return path
    raise BuildError("this build of torch does not use GNU's OpenMP for its threads")


def _run_command(command: list[str]) -> str:
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if process.returncode:
        lines = (
            [line for line in process.stderr.splitlines() if "error" in line] or process.stderr.splitlines() or ["?"]
        )
        raise BuildError(f"{command[0]} fails: {lines[0]}")
    return process.stdout
