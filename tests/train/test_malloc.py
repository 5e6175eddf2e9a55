"""Tests of the malloc settings of a CPU worker, by the number of page faults."""

import os
import subprocess
import sys

from mhmoe_ray.train import malloc

# Some systems back large allocations by huge pages, of which each has one fault. PR_SET_THP_DISABLE forbids them.
FORBID_HUGE_PAGES = "import ctypes; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)"
ALLOCATION_SCRIPT = """
import resource, threading

def passes():
    for turn in range(6):
        large = [bytearray(16 << 20) for _ in range(4)]
        for part in large:
            part[::4096] = part[::4096].replace(b"\\0", b"1")
        if turn == 0:
            first = faults()
    print(faults() - first)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

thread = threading.Thread(target=passes)
thread.start()
thread.join()
"""


def _count_page_faults(environment: dict[str, str], prologue: str = "") -> int:
    """Return the number of page faults of a thread that allocates the same 64 MB again five times."""
    script = prologue + ALLOCATION_SCRIPT
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


def test_malloc_settings_keep_freed_memory():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"PYTHONMALLOC": "malloc"}
    default_faults, tuned_faults = (
        _count_page_faults(environment, FORBID_HUGE_PAGES),
        _count_page_faults(environment | malloc.malloc_settings(environment)),
    )
    # 64 MB are 4 * 4096 pages, so on average each page was faulted in at least once in the five rounds.
    assert default_faults > 4 * 4096
    assert tuned_faults < 500


def test_variables_that_the_environment_sets_are_left_out():
    settings = malloc.malloc_settings({"MALLOC_ARENA_MAX": "4"})
    assert "MALLOC_ARENA_MAX" not in settings
    assert settings["MALLOC_MMAP_MAX_"] == "0"


def test_other_systems_have_no_settings(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert malloc.malloc_settings({}) == {}
