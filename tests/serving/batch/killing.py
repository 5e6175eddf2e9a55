"""Functions that find, suspend and kill the processes of a batch inference on the local cluster."""

import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.serving.batch.job import OUTPUT_KEY
from tests.faults.harness import kill
from tests.support.watch import wait_until


def chunk_count(folder: Path) -> int:
    """Return the number of files of answers in an output folder."""
    return len(list(folder.glob("chunk-*")))


def running_job(folder: Path) -> dict[str, Any]:
    """Wait until a job that writes its answers into this folder has a driver, and return Ray's details of the job."""
    connection = connect()

    def find_job() -> dict[str, Any] | None:
        for details in dashboard.get(connection.address, "/api/jobs/", connection.token):
            if details["status"] == "RUNNING" and details["metadata"].get(OUTPUT_KEY) == str(folder):
                return details if details["driver_info"] else None
        return None

    return wait_until(find_job, "the job's driver")


def worker_pids(job: dict[str, Any]) -> set[int]:
    """Return the process ids of the live workers of a job."""
    connection = connect()
    query = f"filter_keys=job_id&filter_predicates=%3D&filter_values={job['job_id']}&limit=1000"
    actors = dashboard.get(connection.address, f"/api/v0/actors?{query}", connection.token)["data"]["result"]["result"]
    return {a["pid"] for a in actors if a["class_name"].startswith("MapWorker") and a["state"] == "ALIVE"}


def kill_driver(job: dict[str, Any]) -> None:
    """Kill the driver of a job by SIGKILL."""
    assert kill(int(job["driver_info"]["pid"]))


def suspend_new_workers(job: dict[str, Any], workers: int, known_pids: Collection[int] = ()) -> set[int]:
    """Suspend each new worker of a job by SIGSTOP as soon as it has started, and return their process ids.

    Afterwards the job cannot end before they continue, however fast the machine is.

    Args:
        job: The job.
        workers: The number of new workers to wait for.
        known_pids: The process ids of earlier workers, which Ray may list for a moment after their death.
    """
    suspended_pids: set[int] = set()

    def suspend_all() -> bool:
        for pid in worker_pids(job) - suspended_pids - set(known_pids):
            assert kill(pid, signal.SIGSTOP)
            suspended_pids.add(pid)
        return len(suspended_pids) == workers

    wait_until(suspend_all, f"{workers} workers")
    return suspended_pids
