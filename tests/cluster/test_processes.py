"""Ending processes, without Ray."""

import subprocess
import sys

import psutil

from mhmoe_ray.cluster import spawn
from tests.watch import LIMIT, wait_until

# Never asks how its child ended, as the first process of a container may not.
CARELESS = """
import subprocess, time
child = subprocess.Popen(["true"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_who_has_ended_is_not_waited_for_though_its_parent_does_not_ask():
    with subprocess.Popen([sys.executable, "-c", CARELESS], stdout=subprocess.PIPE, text=True) as parent:
        try:
            child = psutil.Process(int(parent.stdout.readline()))
            wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE, "its end")
            assert spawn._wait_for_end(LIMIT, [child]) == []
        finally:
            parent.kill()


def test_who_ends_neither_by_itself_nor_when_asked_is_killed():
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            zombie = psutil.Process(process.pid)
            spawn.end_processes([zombie], timeout=0.5, terminate=True)
            assert spawn._is_gone_or_zombie(zombie)
        finally:
            process.kill()
