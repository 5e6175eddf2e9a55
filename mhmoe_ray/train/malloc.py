"""Settings of the C library that make malloc keep freed memory on a CPU worker.

A training step allocates the same large tensors as the step before it. By default glibc returns each of them to the
system and maps it again, at one page fault per 4 KiB; training runs in a thread of its own, where glibc does so for all
of them. With these settings they stay in one heap of huge pages and are reused (figures: kernels/README.md).
"""

import sys
from collections.abc import Mapping

_KEEP = {
    "MALLOC_ARENA_MAX": "1",  # for all threads the one heap that can keep, rather than one for each
    "MALLOC_MMAP_MAX_": "0",  # large tensors come from it too
    "MALLOC_TRIM_THRESHOLD_": "-1",  # and stay in it
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables for the start of a process that trains on CPUs; none where the system is not Linux.

    Args:
        environment: environment of this process; variables that it sets itself are left out, so that they keep their
            value.
    """
    return {k: v for k, v in _KEEP.items() if k not in environment} if sys.platform == "linux" else {}
