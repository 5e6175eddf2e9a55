"""Highest rates that the GPU reaches for matrix products, copies and kernel launches; properties of the machine."""

import platform
import shutil
import time
from collections.abc import Iterator
from functools import partial

import torch

from mhmoe_ray import __version__
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings
from mhmoe_ray.bench.timing import device_clock, find_hardware, time_interleaved


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield the only case: versions and limits of the machine, rates of products and copies, and time of a launch."""
    yield PartCase("rates", partial(_measure, settings))


def _measure(settings: Settings) -> Rows:
    device = settings.torch_device
    versions = {
        "date": time.strftime("%Y-%m-%d"),
        "mhmoe_ray": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    yield {"name": "machine", "device": str(find_hardware(settings.device)), **versions}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        yield {
            "name": "card",
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gb": round(card.total_memory / 1e9, 1),
            "shared_bytes": getattr(card, "shared_memory_per_block_optin", None),
            "compute_sanitizer": shutil.which("compute-sanitizer"),
        }
    size, values = (64, 1 << 12) if settings.is_toy else (8192, 1 << 29)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(values, device=device, dtype=torch.bfloat16) for _ in range(2))
    timings = time_interleaved(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, settings.rounds, device_clock(device)
    )
    yield {"name": "matrix product", "TFLOP/s": 2 * size**3 / timings["product"].median / 1e12}
    yield {"name": "copy", "TB/s": 2 * source.nbytes / timings["copy"].median / 1e12}
    counter = torch.zeros(1, device=device)
    clock, launches = device_clock(device), 100 if settings.is_toy else 10_000
    start = clock()
    for _ in range(launches):
        counter.add_(1)
    host_seconds = time.perf_counter() - start
    yield {"name": "launch", "us": (clock() - start) / launches * 1e6, "us_of_the_host": host_seconds / launches * 1e6}
