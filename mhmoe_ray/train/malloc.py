"""What the C library is told on a CPU worker: to keep the memory it once had.

A training step asks for the same large tensors as
the step before it. As it comes, glibc gives each of them back to the system and fetches it anew, one page fault for 4
KiB; training runs in a thread of its own, where it does so for all of them. Kept in huge pages of one heap, they are
there already (figures: kernels/README.md).
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
    """Variables for the start of a process that trains on CPUs; none where the system has no such C library.

    Args:
        environment: of this process; what it sets itself stays.
    """
    return {k: v for k, v in _KEEP.items() if k not in environment} if sys.platform == "linux" else {}
