"""A slow link on one machine: two network namespaces, joined by a pair of virtual interfaces that are shaped by `tc`.

What processes of one namespace say to each other goes over its own address, which the kernel hands to its loopback: it
crosses no link, though gloo knows of the slow interface alone.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.errors import JobError, SpecError

INTERFACE = "slow"
"""Its name in both namespaces."""


class Namespace(NamedTuple):
    name: str

    @property
    def command(self) -> list[str]:
        """What goes before a command that is to run in it."""
        return ["ip", "netns", "exec", self.name]


@contextmanager
def slow_link(rate: str) -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces that end with the block, also on Ctrl-C and where the process is told to end.

    Args:
        rate: each way, as `tc` writes it: 200mbit, 1gbit.

    Raises:
        SpecError: it is no rate, or this machine or user cannot have such a link.
        JobError: the kernel refuses one.
    """
    if not re.fullmatch(r"\d+(\.\d+)?[kmg]bit", rate):
        raise SpecError(f"--slow-link {rate}", "it is not a rate", "write one like 200mbit or 1gbit")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        fix = "install iproute2, on Linux, or leave the option out"
        raise SpecError("--slow-link", f"network namespaces need {' and '.join(missing)}", fix)
    if os.geteuid() != 0:
        raise SpecError("--slow-link", "network namespaces need root", "run it as root, or leave the option out")
    ends = Namespace(f"mhmoe-{os.getpid()}-a"), Namespace(f"mhmoe-{os.getpid()}-b")
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for end in ends:
            _run("ip", "netns", "add", end.name)
        a, b = (end.name for end in ends)
        _run(*f"ip link add {INTERFACE} netns {a} type veth peer name {INTERFACE} netns {b}".split())
        for i, end in enumerate(ends):
            _run(*f"ip -n {end.name} address add 10.231.77.{i + 1}/30 dev {INTERFACE}".split())
            for interface in ("lo", INTERFACE):
                _run(*f"ip -n {end.name} link set {interface} up".split())
            # Room for some packets as large as the kernel makes them, and for what comes in a few of its ticks.
            shape = f"tbf rate {rate} burst 256k latency 200ms"
            _run(*f"tc -n {end.name} qdisc add dev {INTERFACE} root {shape}".split())
        yield ends
    finally:
        for end in ends:
            # Not of the terminal's group, whose Ctrl-C would end it too; one that was not made yet is none to remove.
            if Path("/run/netns", end.name).exists():
                subprocess.run(["ip", "netns", "delete", end.name], check=True, start_new_session=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def crossed() -> int:
    """Bytes that have crossed the link both ways so far, with all headers; asked in one of its namespaces."""
    statistics = Path("/sys/class/net", INTERFACE, "statistics")
    return sum(int((statistics / f"{way}_bytes").read_text()) for way in ("rx", "tx"))


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = f"`{' '.join(command)}` said {done.stderr.strip().partition(chr(10))[0]}"
        raise JobError("slow link", why, "leave --slow-link out, or run it where the kernel has network shaping")
