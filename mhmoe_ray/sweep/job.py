"""The job of a sweep, which starts its runs.

A run is an ordinary one: `mhmoe status`,
`logs`, `stop` and `resume` know it, and what happens to it leaves the others alone. This job may be killed and started
again at any time: what runs goes on by itself, and what is finished stays so. It makes way for a newer one.
"""

import time
from typing import ClassVar

from mhmoe_ray.cluster import tokens
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.errors import logging_errors
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.runs.sweeps import Order, SweepDir
from mhmoe_ray.storage import location

ORDER_SECONDS = 60


class SweepRequest(RemoteJob[None]):
    """An order of a sweep, which says in its directory what to run."""

    module: ClassVar[str] = "mhmoe_ray.sweep.job"
    kind: ClassVar[str] = "sweep"

    path: str
    """Of the sweep's directory."""
    order: str

    @property
    def place(self) -> SweepDir:
        return SweepDir(location(self.path))

    @property
    def job_name(self) -> str:
        return f"{self.kind}-{self.place.name}-{self.order}"


def main() -> None:
    import ray

    from mhmoe_ray.sweep.scheduler import Sweep

    request = SweepRequest.received()
    place, name = request.place, request.order
    with logging_errors():
        context = ray.init()
        try:
            local = _written(place, name).local
        except TimeoutError:  # the command was ended before it could write it
            print("nobody asked for this")
            return
        connection = Connection(f"http://{context.dashboard_url}", local, local, tokens.user_token())
        Sweep(place, name, connection).run()


def _written(place: SweepDir, name: str) -> Order:
    """The order, which its command writes after the cluster has taken this job."""
    for _ in range(ORDER_SECONDS):
        if name in place.orders():
            return place.order(name)
        time.sleep(1)
    raise TimeoutError


if __name__ == "__main__":
    main()
