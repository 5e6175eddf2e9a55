"""The settings that a CPU worker gives to its C library, judged by what the library then does."""

import os
import subprocess
import sys

from mhmoe_ray.train import malloc

AGAIN_AND_AGAIN = """
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


def _faults(environment: dict[str, str]) -> int:
    """Return the pages fetched from the system by a thread that asks for the same 64 MB once more, five times."""
    done = subprocess.run([sys.executable, "-c", AGAIN_AND_AGAIN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_that_a_thread_gave_back_is_there_when_it_asks_again():
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    mine |= {"PYTHONMALLOC": "malloc"}
    plain, told = _faults(mine), _faults(mine | malloc.settings(mine))
    assert plain > 4 * 4096  # at least once in these five times
    assert told < 500


def test_what_the_environment_sets_stays():
    settings = malloc.settings({"MALLOC_ARENA_MAX": "4"})
    assert "MALLOC_ARENA_MAX" not in settings
    assert settings["MALLOC_MMAP_MAX_"] == "0"


def test_nothing_is_set_where_it_means_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert malloc.settings({}) == {}
