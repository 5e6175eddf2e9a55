import os
import subprocess
import sys
import time

from tests.benchmarks.process_memory import MemoryUsage, descendants, memory_usage

MB = 1_000_000
# The code of three processes: one with 200 MB of private memory, one that maps 200 MB of a file, and a parent that only
# waits for its child.
PRIVATE_CODE = "x = bytearray(b'1') * 200_000_000"
MAPPED_CODE = """
import mmap
with open({path!r}, 'rb') as f:
    x = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    total = sum(x[i] for i in range(0, len(x), 4096))"""
CHILD_CODE = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"


# The watching code runs in a small process of its own, because a child counts as large as its parent between fork and
# exec. Started by pytest itself, each child would count as large as pytest.
WATCH_CODE = """
import subprocess, sys
from tests.benchmarks.process_memory import PeakMemory
with PeakMemory() as peak:
    subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True)
print(peak.resident, peak.private)"""


def peak_memory(code: str) -> MemoryUsage:
    """Return the peak that `PeakMemory` records in a process whose grandchild runs `code`."""
    command = [sys.executable, "-c", WATCH_CODE, CHILD_CODE, f"{code}\nimport time\ntime.sleep(2)"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return MemoryUsage(*map(int, output.split()))


def test_peak_is_that_of_largest_descendant(tmp_path):
    (tmp_path / "file").write_bytes(b"1" * 200 * MB)
    private_peak, mapped_peak = peak_memory(PRIVATE_CODE), peak_memory(MAPPED_CODE.format(path=str(tmp_path / "file")))
    assert 200 * MB < private_peak.private <= private_peak.resident < 250 * MB
    assert mapped_peak.private < 50 * MB
    assert 200 * MB < mapped_peak.resident < 250 * MB


def test_peak_includes_process_itself():
    code = f"""
import time
from tests.benchmarks.process_memory import PeakMemory
with PeakMemory() as peak:
    {PRIVATE_CODE}
    time.sleep(1)
print(peak.private)"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output) > 200 * MB


def test_descendants_are_listed_until_they_end():
    with subprocess.Popen(
        [sys.executable, "-c", CHILD_CODE, "import time; time.sleep(60)"], stderr=subprocess.DEVNULL
    ) as parent:
        while len(descendants(parent.pid)) == 0:
            time.sleep(0.01)
        [child] = descendants(parent.pid)
        assert {parent.pid, child} <= set(descendants(os.getpid()))
        assert memory_usage(child).resident > 0
        os.kill(child, 9)
        parent.wait()
        assert memory_usage(parent.pid) == memory_usage(child) == MemoryUsage(0, 0)
    assert not {parent.pid, child} & set(descendants(os.getpid()))
