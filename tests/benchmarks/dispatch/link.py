"""Slow link that joins two network namespaces by a pair of virtual interfaces, which `tc` shapes.

Processes in a namespace communicate through the address of its slow interface, the only one that gloo uses. Linux
routes this address over loopback, so their traffic does not cross the link.
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
"""Name of the slow interface in both namespaces."""


class Namespace(NamedTuple):
    """Network namespace of Linux, in which the processes of one simulated node run."""

    name: str

    @property
    def command(self) -> list[str]:
        """Prefix of a command that is to run in this namespace."""
        return ["ip", "netns", "exec", self.name]


@contextmanager
def slow_link(rate: str) -> Iterator[tuple[Namespace, Namespace]]:
    """Yield two network namespaces with a slow link between them, and remove them at the end of the block.

    They are also removed on Ctrl-C, SIGTERM and SIGHUP. `rate` is the bandwidth in each direction as `tc` writes it,
    such as 200mbit. A malformed rate, or a machine or user that cannot create such a link, is a SpecError. A refusal by
    Linux is a JobError.
    """
    if not re.fullmatch(r"\d+(\.\d+)?[kmg]bit", rate):
        raise SpecError(f"--slow-link {rate}", "it is not a rate", "write one like 200mbit or 1gbit")
    if missing_tools := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        fix = "install iproute2, on Linux, or leave the option out"
        raise SpecError("--slow-link", f"network namespaces need {' and '.join(missing_tools)}", fix)
    if os.geteuid() != 0:
        raise SpecError("--slow-link", "network namespaces need root", "run it as root, or leave the option out")
    namespaces = Namespace(f"mhmoe-{os.getpid()}-a"), Namespace(f"mhmoe-{os.getpid()}-b")
    previous_handlers = {number: signal.signal(number, _exit_on_signal) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for namespace in namespaces:
            _run_command("ip", "netns", "add", namespace.name)
        a, b = (end.name for end in namespaces)
        _run_command(*f"ip link add {INTERFACE} netns {a} type veth peer name {INTERFACE} netns {b}".split())
        for i, namespace in enumerate(namespaces):
            _run_command(*f"ip -n {namespace.name} address add 10.231.77.{i + 1}/30 dev {INTERFACE}".split())
            for interface in ("lo", INTERFACE):
                _run_command(*f"ip -n {namespace.name} link set {interface} up".split())
            # The burst is the number of bytes that `tbf` sends at once. It must hold several of the largest packets
            # of Linux and the bytes of a few timer ticks, because otherwise the link would not reach its rate.
            shape = f"tbf rate {rate} burst 256k latency 200ms"
            _run_command(*f"tc -n {namespace.name} qdisc add dev {INTERFACE} root {shape}".split())
        yield namespaces
    finally:
        for namespace in namespaces:
            # `ip` runs in a session of its own, so that Ctrl-C in the terminal does not interrupt the removal. A
            # namespace is missing if a command above failed before it was created.
            if Path("/run/netns", namespace.name).exists():
                subprocess.run(["ip", "netns", "delete", namespace.name], check=True, start_new_session=True)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def link_bytes() -> int:
    """Return the bytes that have crossed the link of this namespace so far, in both directions and with all headers."""
    statistics = Path("/sys/class/net", INTERFACE, "statistics")
    return sum(int((statistics / f"{direction}_bytes").read_text()) for direction in ("rx", "tx"))


def _exit_on_signal(number: int, _: object) -> None:
    # By default SIGTERM and SIGHUP end the process without running the `finally` of `slow_link`. SystemExit runs it, so
    # that the network namespaces are removed.
    sys.exit(128 + number)


def _run_command(*command: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = f"`{' '.join(command)}` failed: {process.stderr.strip().partition(chr(10))[0]}"
        raise JobError("slow link", reason, "leave --slow-link out, or run it where the kernel has network shaping")
