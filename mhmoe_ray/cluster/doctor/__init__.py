"""What `mhmoe doctor` looks at: whether things work here, why not, and what to do.

    finding.py   one answer
    machine.py   this machine: packages, accelerators, kernels, shared memory, limits
    reach.py     the cluster that commands would speak to
    ports.py     servers of Ray on this machine that others can reach
    storage.py   the folder that holds run directories

Each has a function that yields findings one by one, as it makes them.
"""

from collections.abc import Iterator

from mhmoe_ray.cluster.doctor import machine, ports, reach, storage
from mhmoe_ray.cluster.doctor.finding import Finding
from mhmoe_ray.storage import location

__all__ = ["Finding", "examine"]


def examine(address: str | None, folder: str) -> Iterator[Finding]:
    """One after another, as they are found.

    Args:
        address: of a cluster, as commands take it.
        folder: that holds run directories, or is to.
    """
    yield from machine.machine_findings()
    yield from reach.reach_findings(address)
    yield from ports.port_findings()
    yield from storage.storage_findings(location(folder))
