"""The Ray job of a sweep, which starts the runs of the sweep.

A run of a sweep is an ordinary run: `mhmoe status`, `logs`, `stop` and `resume` work on it, and its failure does not
affect the others. The runs do not depend on this job, so it may be killed and started again at any time. The job
carries out one order, a file that lists the runs to start, and ends when a newer order with its own job replaces it.
"""

import time
from typing import ClassVar

from mhmoe_ray.cluster import tokens
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.errors import logging_errors
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.runs.sweeps import SweepDir, SweepOrder
from mhmoe_ray.storage import location

ORDER_SECONDS = 60
"""Seconds for which the job waits for its order, which the submitting command writes within a moment."""


class SweepRequest(RemoteJob[None]):
    """Request for the job that carries out an order of a sweep."""

    module: ClassVar[str] = "mhmoe_ray.sweep.job"
    kind: ClassVar[str] = "sweep"

    path: str
    """Path of the sweep's directory."""
    order: str
    known_addresses: tuple[str, ...] = ()
    """Addresses of earlier jobs of the sweep that the user knows, so that this job may send them the token."""

    @property
    def sweep_dir(self) -> SweepDir:
        return SweepDir(location(self.path))

    @property
    def job_name(self) -> str:
        return f"{self.kind}-{self.sweep_dir.name}-{self.order}"


def main() -> None:
    """Wait until the order of a `SweepRequest` is written, and start the runs that it lists."""
    import ray

    from mhmoe_ray.sweep.scheduler import Sweep

    request = SweepRequest.received()
    sweep_dir, name = request.sweep_dir, request.order
    with logging_errors():
        context = ray.init()
        order = _wait_for_order(sweep_dir, name)
        if order is None:
            # `mhmoe sweep` was killed after it submitted this job and before it wrote the order that lists the runs, so
            # there is nothing to run.
            print("there is no order for this job")
            return
        connection = Connection(f"http://{context.dashboard_url}", order.local, order.local, tokens.user_token())
        Sweep(sweep_dir, name, connection, request.known_addresses).run()


def _wait_for_order(sweep_dir: SweepDir, name: str) -> SweepOrder | None:
    """Return the order, which a command writes once the cluster has accepted this job; None if it does not."""
    for _ in range(ORDER_SECONDS):
        if name in sweep_dir.order_names():
            return sweep_dir.read_order(name)
        time.sleep(1)
    return None


if __name__ == "__main__":
    main()
