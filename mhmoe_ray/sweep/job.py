"""The job of a sweep, which starts its runs.

Run by Ray Jobs as `python -m mhmoe_ray.sweep.job SWEEP_DIR ORDER`. A run is an ordinary one: `mhmoe status`,
`logs`, `stop` and `resume` know it, and what happens to it leaves the others alone. This job may be killed and started
again at any time: what runs goes on by itself, and what is finished stays so. It makes way for a newer one.
"""

import sys
import time

import ray

from mhmoe_ray.cluster import tokens
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.errors import logging_errors
from mhmoe_ray.runs.sweeps import Order, SweepDir
from mhmoe_ray.storage import location
from mhmoe_ray.sweep.scheduler import Sweep

ORDER_SECONDS = 60


def main() -> None:
    place, name = SweepDir(location(sys.argv[1])), sys.argv[2]
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
