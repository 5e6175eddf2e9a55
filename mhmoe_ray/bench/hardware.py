"""The device that a measurement runs on: whether it is there, what it is called, and a clock that waits for it."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mhmoe_ray.errors import SpecError


class Hardware(NamedTuple):
    device: torch.device
    name: str
    """Of the processor or card."""
    threads: int | None
    """Of torch, on a CPU."""

    def as_json(self) -> dict[str, Any]:
        return {"device": self.device.type, "machine": self.name, "threads": self.threads}

    def __str__(self) -> str:
        return self.name if self.threads is None else f"{self.name}, {self.threads} threads"


def find(device: str) -> Hardware:
    """`cpu`, or `cuda`: the current card.

    Raises:
        SpecError: torch finds no card.
    """
    if device == "cpu":
        return Hardware(torch.device("cpu"), cpu_name(), torch.get_num_threads())
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        why = f"torch {torch.__version__} {built} and finds no card"
        raise SpecError("device cuda", why, "use --device cpu, or run it where there is one")
    return Hardware(torch.device("cuda"), torch.cuda.get_device_name(), None)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name where the system tells it, else its architecture."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(names[0].replace("(R)", "").replace("(TM)", "").split()) if names else platform.machine()


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has done all it was given."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
