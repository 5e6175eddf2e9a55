"""Settings of memory allocators: the C library's on a CPU worker, which keep freed memory, and CUDA's.

A training step allocates the same large tensors as the previous step. By default glibc returns each of them to the
system and maps it again, at one page fault per 4 KiB: training runs in a thread of its own, where this happens to all
large tensors. With these settings, memory stays in one heap of huge pages (measurements: kernels/README.md).
"""

import sys
from collections.abc import Mapping

_SETTINGS = {
    # All threads use the main heap, because only the main heap can keep freed memory.
    "MALLOC_ARENA_MAX": "1",
    # Large tensors come from the heap, too. Memory from mmap would be returned to the system as soon as it is freed.
    "MALLOC_MMAP_MAX_": "0",
    # Freed memory at the end of the heap is never returned to the system.
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


CUDA_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments(environment: Mapping[str, str]) -> None:
    """Let torch's CUDA allocator extend its segments, which avoids fragments, unless the environment configures it.

    It must be called before the first allocation on the GPU.
    """
    # The malloc settings above need environment variables, for which Ray starts each process twice. This one does not.
    if not environment.keys() & set(CUDA_VARIABLES):
        from torch._C import _accelerator_setAllocatorSettings

        _accelerator_setAllocatorSettings("expandable_segments:True")


def malloc_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables for training on CPUs that `environment` does not have yet; none unless on Linux."""
    return {k: v for k, v in _SETTINGS.items() if k not in environment} if sys.platform == "linux" else {}
