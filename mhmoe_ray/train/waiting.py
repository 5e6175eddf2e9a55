"""That workers cannot start for want of room: Ray Train asks again without end, and tells nobody."""

from mhmoe_ray.errors import StorageError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir


def record_waiting(run: RunDir) -> None:
    """Unless that was said already."""
    try:
        if events.state(events.events(run)) != "waiting":
            events.record(run, "waiting")
    except (OSError, StorageError) as e:  # no reason not to wait
        print(f"warning: the workers wait for room, but {e}")
