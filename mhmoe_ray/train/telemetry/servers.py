"""The tracking servers of a run: MLflow, Weights & Biases. This module does not need torch."""

from collections.abc import Callable

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.telemetry import mlflow, wandb
from mhmoe_ray.train.telemetry.tracker import EndStatus, QueuedTracker, TrackingServer

OpenServer = Callable[[RunDir, RunSpec], TrackingServer | None]
"""Function that returns a run's connection to a tracking server, without a request; None if the spec does not ask for
it. A JobError says what this machine lacks for it."""
SERVERS: tuple[OpenServer, ...] = (mlflow.open_server, wandb.open_server)


def open_servers(run: RunDir, spec: RunSpec) -> list[TrackingServer]:
    """Return a run's connections to the tracking servers of its spec, or raise a JobError, as `OpenServer` says."""
    return [server for open_server in SERVERS if (server := open_server(run, spec))]


def send_history(run: RunDir, end_status: EndStatus) -> dict[str, int]:
    """Send the steps of an ended run that its tracking servers lack; return the number of unsent steps by server."""
    last_line = history.last_line(run)
    last_step = last_line[metrics.STEP] if last_line else 0
    trackers = {server.name: QueuedTracker(server, run, last_step) for server in open_servers(run, run.spec())}
    return {name: tracker.finish(end_status) for name, tracker in trackers.items()}
