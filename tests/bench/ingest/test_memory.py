import os
import subprocess
import sys
import time

from mhmoe_ray.bench.process_memory import Usage, descendants, usage_of

MB = 1_000_000
# A process that takes so many MB of its own, one that maps so many of a file, each below another that only waits.
OWN = "x = bytearray(b'1') * 200_000_000"
MAPPED = """
import mmap
with open({path!r}, 'rb') as f:
    x = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    total = sum(x[i] for i in range(0, len(x), 4096))"""
BELOW = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"


# In a small process, since between fork and exec a child counts as large as its parent, which pytest is here.
WATCH = """
import subprocess, sys
from mhmoe_ray.bench.process_memory import Peak
with Peak() as peak:
    subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True)
print(peak.resident, peak.own)"""


def peak_of(code: str) -> Usage:
    command = [sys.executable, "-c", WATCH, BELOW, f"{code}\nimport time\ntime.sleep(2)"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Usage(*map(int, printed.split()))


def test_the_peak_is_that_of_the_largest_process_below(tmp_path):
    (tmp_path / "file").write_bytes(b"1" * 200 * MB)
    own, mapped = peak_of(OWN), peak_of(MAPPED.format(path=str(tmp_path / "file")))
    assert 200 * MB < own.own <= own.resident < 250 * MB
    assert mapped.own < 50 * MB
    assert 200 * MB < mapped.resident < 250 * MB


def test_the_peak_is_of_the_process_itself_where_that_is_the_largest():
    code = f"""
import time
from mhmoe_ray.bench.process_memory import Peak
with Peak() as peak:
    {OWN}
    time.sleep(1)
print(peak.own)"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(printed) > 200 * MB


def test_processes_below_are_found_until_they_end():
    with subprocess.Popen(
        [sys.executable, "-c", BELOW, "import time; time.sleep(60)"], stderr=subprocess.DEVNULL
    ) as parent:
        while len(descendants(parent.pid)) == 0:
            time.sleep(0.01)
        [child] = descendants(parent.pid)
        assert {parent.pid, child} <= set(descendants(os.getpid()))
        assert usage_of(child).resident > 0
        os.kill(child, 9)
        parent.wait()
        assert usage_of(parent.pid) == usage_of(child) == Usage(0, 0)
    assert not {parent.pid, child} & set(descendants(os.getpid()))
