"""Tests of functions that end processes, without Ray."""

import subprocess
import sys

import psutil

from mhmoe_ray.cluster import spawn
from tests.support.watch import LIMIT, wait_until

# This code never reaps its child, like the first process of some containers, so the ended child stays a zombie.
CARELESS = """
import subprocess, time
child = subprocess.Popen(["true"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_wait_for_end_counts_a_zombie_as_ended():
    with subprocess.Popen([sys.executable, "-c", CARELESS], stdout=subprocess.PIPE, text=True) as parent:
        try:
            child = psutil.Process(int(parent.stdout.readline()))
            wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE, "its end")
            assert spawn._wait_for_end(LIMIT, [child]) == []
        finally:
            parent.kill()


def test_process_that_ignores_sigterm_is_killed():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            stubborn_process = psutil.Process(process.pid)
            spawn.end_processes([stubborn_process], timeout=0.5, terminate=True)
            assert spawn._is_gone_or_zombie(stubborn_process)
        finally:
            process.kill()
